package main

import (
	"encoding/hex"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	pb "modelaverage/v1"
)

// The worked example of docs/protocol.md: every fragment of a push as it goes over the wire.
var (
	exampleManifest = &pb.Manifest{FragmentSizeBytes: 16, Variables: []*pb.Variable{
		{Name: "w", DataType: pb.DataType_DATA_TYPE_FLOAT32, Shape: []int64{2}},
		{Name: "s", DataType: pb.DataType_DATA_TYPE_FLOAT16},
		{Name: "b", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{1}},
	}}
	exampleValues   = []string{"0000803f000000c0", "0038", "0000000000000840"}
	exampleMessages = []string{
		"12 12 12 10 00 00 80 3f 00 00 00 c0 00 38 00 00 00 00 00 00",
		"12 0c 08 01 12 08 00 00 00 00 00 00 08 40",
	}
)

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	data, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestFragmentsAreThoseOfTheProtocolPage(t *testing.T) {
	var values [][]byte
	for _, value := range exampleValues {
		values = append(values, unhex(t, value))
	}
	fragments := cut(flatten(values), exampleManifest.FragmentSizeBytes)
	if len(fragments) != len(exampleMessages) {
		t.Fatalf("%d fragments, not %d", len(fragments), len(exampleMessages))
	}
	for i, fragment := range fragments {
		var want pb.PushAndAverageRequest
		if err := proto.Unmarshal(unhex(t, exampleMessages[i]), &want); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(&pb.PushAndAverageRequest{Fragment: fragment}, &want) {
			t.Errorf("fragment %d is %v, not %v", i, fragment, want.Fragment)
		}
	}
}

func TestFragmentsGiveTheVariablesBack(t *testing.T) {
	layout, err := newLayout(exampleManifest)
	if err != nil {
		t.Fatal(err)
	}
	received := &assembly{layout: layout}
	for _, message := range exampleMessages {
		if _, err := received.finish(); err == nil {
			t.Fatal("a center is whole before all fragments have come")
		}
		var request pb.PushAndAverageRequest
		if err := proto.Unmarshal(unhex(t, message), &request); err != nil {
			t.Fatal(err)
		}
		if err := received.add(request.Fragment); err != nil {
			t.Fatal(err)
		}
		if received.add(request.Fragment) == nil {
			t.Fatal("a fragment may come twice")
		}
	}
	values, err := received.finish()
	if err != nil {
		t.Fatal(err)
	}
	for i, value := range values {
		if got := hex.EncodeToString(value); got != exampleValues[i] {
			t.Errorf("variable %d is %s, not %s", i, got, exampleValues[i])
		}
	}
}
