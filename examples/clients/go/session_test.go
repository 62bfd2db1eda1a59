package main

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "modelaverage/v1"
)

// More than gRPC's flow control lets a client send to a server that does not read.
const (
	largeBytes    = 8 << 20
	fragmentBytes = 1 << 20
	testTimeout   = 20 * time.Second
)

// A pushServer ends every push as a test wants.
type pushServer struct {
	pb.UnimplementedParameterServerServer
	end func(pb.ParameterServer_PushAndAverageServer) error
}

func (p *pushServer) PushAndAverage(stream pb.ParameterServer_PushAndAverageServer) error {
	return p.end(stream)
}

// readAll returns when the client has half-closed.
func readAll(stream pb.ParameterServer_PushAndAverageServer) {
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
	}
}

func TestAPushThatEndsEarlyReturns(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	pushing, interrupt := context.WithCancel(ctx)
	ends := map[string]struct {
		ctx context.Context
		end func(pb.ParameterServer_PushAndAverageServer) error
	}{
		"ROUND_FULL: full": {ctx, func(stream pb.ParameterServer_PushAndAverageServer) error { // nothing was read
			stream.SetTrailer(metadata.Pairs("modelaverage-reason", "ERROR_REASON_ROUND_FULL", "modelaverage-action", "stop"))
			return status.Error(codes.ResourceExhausted, "full")
		}},
		"CLIENT: the stream ended without an outcome": {ctx, func(stream pb.ParameterServer_PushAndAverageServer) error {
			readAll(stream)
			return nil
		}},
		"CLIENT: fragment 7 of 0 bytes came, where 0 of 1048576 bytes belongs": {
			ctx, func(stream pb.ParameterServer_PushAndAverageServer) error {
				readAll(stream)
				stream.Send(&pb.PushAndAverageResponse{Fragment: &pb.Fragment{Index: 7}})
				<-stream.Context().Done() // when the client gives up
				return nil
			}},
		"context canceled": {pushing, func(stream pb.ParameterServer_PushAndAverageServer) error {
			interrupt()
			<-stream.Context().Done()
			return nil
		}},
	}
	for want, how := range ends {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer()
		pb.RegisterParameterServerServer(server, &pushServer{end: how.end})
		go server.Serve(listener)
		s, err := connect(listener.Addr().String(), "a")
		if err != nil {
			t.Fatal(err)
		}
		s.layout, err = newLayout(&pb.Manifest{FragmentSizeBytes: fragmentBytes, Variables: []*pb.Variable{
			{Name: "w", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{largeBytes / 8}}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.push(how.ctx, [][]byte{make([]byte, largeBytes)}); err == nil || err.Error() != want {
			t.Errorf("the push ended with %v, not with %s", err, want)
		}
		s.conn.Close()
		server.Stop()
	}
}
