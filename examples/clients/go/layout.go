package main

import (
	"math"

	pb "modelaverage/v1"
)

// alignment is where a variable may start in the flat buffer: at a multiple of so many bytes.
const alignment = 8

// elementSizes has the bytes of one element of every type.
var elementSizes = map[pb.DataType]int{
	pb.DataType_DATA_TYPE_FLOAT32:  4,
	pb.DataType_DATA_TYPE_FLOAT64:  8,
	pb.DataType_DATA_TYPE_FLOAT16:  2,
	pb.DataType_DATA_TYPE_BFLOAT16: 2,
}

// A layout says where the variables of a manifest lie in the flat buffer.
type layout struct {
	manifest      *pb.Manifest
	starts, sizes []int // of each variable, in bytes
	sizeBytes     int   // of the flat buffer
}

// newLayout refuses a manifest that this client cannot work with.
func newLayout(manifest *pb.Manifest) (*layout, error) {
	if manifest.GetShard() != nil {
		return nil, refuse("the server has shard %d of a model on %d servers; this client knows one server only",
			manifest.Shard.Index, manifest.Shard.Count)
	}
	if manifest.GetFragmentSizeBytes() == 0 {
		return nil, refuse("the manifest has no fragment size")
	}
	l := &layout{manifest: manifest}
	for _, variable := range manifest.Variables {
		size, known := elementSizes[variable.DataType]
		if !known {
			return nil, refuse("variable %q has the unknown type %v", variable.Name, variable.DataType)
		}
		for _, extent := range variable.Shape {
			if extent < 0 || extent > 0 && int64(size) > math.MaxInt32*alignment/extent {
				return nil, refuse("variable %q of shape %v is too large for this client", variable.Name, variable.Shape)
			}
			size *= int(extent)
		}
		start := aligned(l.sizeBytes)
		l.starts, l.sizes = append(l.starts, start), append(l.sizes, size)
		if size > 0 {
			l.sizeBytes = start + size
		}
	}
	return l, nil
}

func aligned(sizeBytes int) int {
	return (sizeBytes + alignment - 1) / alignment * alignment
}

// fragments is the number of fragments of the flat buffer.
func (l *layout) fragments() int {
	size := int(l.manifest.FragmentSizeBytes)
	return (l.sizeBytes + size - 1) / size
}

// variables cuts a flat buffer into the bytes of each variable; they share its memory.
func (l *layout) variables(flat []byte) [][]byte {
	values := make([][]byte, len(l.starts))
	for i, start := range l.starts {
		if l.sizes[i] > 0 { // an empty variable may start behind the end
			values[i] = flat[start : start+l.sizes[i]]
		}
	}
	return values
}

// flatten lays the variables' bytes out in one buffer, with zeros between.
func flatten(values [][]byte) []byte {
	var flat []byte
	for _, value := range values {
		if len(value) > 0 {
			flat = append(flat, make([]byte, aligned(len(flat))-len(flat))...)
			flat = append(flat, value...)
		}
	}
	return flat
}

// cut makes fragments of a flat buffer; they share its memory. Without a size there are none.
func cut(flat []byte, sizeBytes uint32) []*pb.Fragment {
	var fragments []*pb.Fragment
	for size := int(sizeBytes); size > 0 && len(flat) > 0; {
		if size > len(flat) {
			size = len(flat)
		}
		fragments = append(fragments, &pb.Fragment{Index: uint32(len(fragments)), Data: flat[:size]})
		flat = flat[size:]
	}
	return fragments
}

// An assembly puts the fragments of a center together as they come.
type assembly struct {
	layout *layout
	flat   []byte // grows with what comes: a manifest alone makes nobody allocate
}

func (a *assembly) add(fragment *pb.Fragment) error {
	next, size := len(a.flat)/int(a.layout.manifest.FragmentSizeBytes), int(a.layout.manifest.FragmentSizeBytes)
	if left := a.layout.sizeBytes - len(a.flat); size > left {
		size = left
	}
	if int(fragment.Index) != next || len(fragment.Data) != size || size == 0 {
		return refuse("fragment %d with %d bytes came; %d of %d with %d bytes comes next",
			fragment.Index, len(fragment.Data), next, a.layout.fragments(), size)
	}
	a.flat = append(a.flat, fragment.Data...)
	return nil
}

// finish gives the bytes of each variable, once all fragments have come.
func (a *assembly) finish() ([][]byte, error) {
	if len(a.flat) != a.layout.sizeBytes {
		return nil, refuse("the stream ended with %d of %d bytes of the center", len(a.flat), a.layout.sizeBytes)
	}
	return a.layout.variables(a.flat), nil
}
