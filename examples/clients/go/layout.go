package main

import (
	"math"

	pb "modelaverage/v1"
)

// alignment: every variable starts at a multiple of this many bytes in the flat buffer.
const alignment = 8

// dataTypes has the data types by their names in the conformance kit's lines.
var dataTypes = map[string]pb.DataType{
	"f32":  pb.DataType_DATA_TYPE_FLOAT32,
	"f64":  pb.DataType_DATA_TYPE_FLOAT64,
	"f16":  pb.DataType_DATA_TYPE_FLOAT16,
	"bf16": pb.DataType_DATA_TYPE_BFLOAT16,
}

var elementBytes = map[pb.DataType]int{
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
	if shard := manifest.GetShard(); shard != nil {
		return nil, refuse("the model is on %d servers; this client can work with one", shard.Count)
	}
	if manifest.GetFragmentSizeBytes() == 0 {
		return nil, refuse("the manifest has no fragment size")
	}
	l := &layout{manifest: manifest}
	for _, variable := range manifest.Variables {
		size, known := elementBytes[variable.DataType]
		if !known {
			return nil, refuse("variable %q has the unknown type %v", variable.Name, variable.DataType)
		}
		for _, extent := range variable.Shape {
			if extent < 0 || extent > 0 && int64(size) > math.MaxInt64/2/extent {
				return nil, refuse("variable %q has the impossible shape %v", variable.Name, variable.Shape)
			}
			size *= int(extent)
		}
		start := aligned(l.sizeBytes)
		l.starts, l.sizes = append(l.starts, start), append(l.sizes, size)
		if size > 0 { // an empty variable makes the buffer no longer, not even by padding
			l.sizeBytes = start + size
		}
	}
	return l, nil
}

func aligned(sizeBytes int) int { return (sizeBytes + alignment - 1) / alignment * alignment }

// check says whether there are as many bytes for every variable as it has.
func (l *layout) check(values [][]byte) error {
	if len(values) != len(l.sizes) {
		return refuse("%d variables were given; the center has %d", len(values), len(l.sizes))
	}
	for i, value := range values {
		if len(value) != l.sizes[i] {
			return refuse("%d bytes were given for variable %q; it has %d",
				len(value), l.manifest.Variables[i].Name, l.sizes[i])
		}
	}
	return nil
}

// flatten lays the variables' bytes out in one buffer, with zeros between.
func flatten(values [][]byte) (flat []byte) {
	for _, value := range values {
		if len(value) > 0 {
			flat = append(flat, make([]byte, aligned(len(flat))-len(flat))...)
			flat = append(flat, value...)
		}
	}
	return flat
}

// cut makes fragments of a flat buffer; they share its memory. Without a size there are none.
func cut(flat []byte, fragmentBytes uint32) (fragments []*pb.Fragment) {
	for size := int(fragmentBytes); size > 0 && len(flat) > 0; flat = flat[size:] {
		if size > len(flat) {
			size = len(flat)
		}
		fragments = append(fragments, &pb.Fragment{Index: uint32(len(fragments)), Data: flat[:size]})
	}
	return fragments
}

// An assembly puts a center together from the fragments that come.
type assembly struct {
	*layout
	flat []byte // grows with what comes: a manifest alone makes nobody allocate
}

func (a *assembly) add(fragment *pb.Fragment) error {
	size := int(a.manifest.FragmentSizeBytes)
	next := len(a.flat) / size
	if left := a.sizeBytes - len(a.flat); size > left {
		size = left
	}
	if size == 0 || int(fragment.Index) != next || len(fragment.Data) != size {
		return refuse("fragment %d of %d bytes came, where %d of %d bytes belongs",
			fragment.Index, len(fragment.Data), next, size)
	}
	a.flat = append(a.flat, fragment.Data...)
	return nil
}

// finish gives the bytes of each variable, once all fragments have come.
func (a *assembly) finish() ([][]byte, error) {
	if len(a.flat) != a.sizeBytes {
		return nil, refuse("the stream ended with %d of %d bytes of the center", len(a.flat), a.sizeBytes)
	}
	values := make([][]byte, len(a.sizes))
	for i, size := range a.sizes {
		if size > 0 { // an empty variable may start behind the end
			values[i] = a.flat[a.starts[i] : a.starts[i]+size]
		}
	}
	return values, nil
}
