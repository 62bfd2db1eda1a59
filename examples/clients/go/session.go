package main

import (
	"context"
	"crypto/rand"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	pb "modelaverage/v1"
)

// goesOn has the outcomes after which training goes on from the center that came.
var goesOn = map[pb.Outcome]bool{pb.Outcome_OUTCOME_COMMITTED: true, pb.Outcome_OUTCOME_STALE: true,
	pb.Outcome_OUTCOME_ALREADY_COUNTED: true}

// A session is one worker's conversation with the server, one call at a time. Every method tries again what may be
// tried again, and ends early with ctx.
type session struct {
	conn        *grpc.ClientConn
	server      pb.ParameterServerClient
	workerID    string
	incarnation []byte
	isChief     bool

	layout     *layout // nil before the first center
	manifestID string
	baseStep   uint64
	pushID     uint64
}

// connect does not wait for the server; the first call does.
func connect(address, workerID string) (*session, error) {
	incarnation := make([]byte, 16)
	if _, err := rand.Read(incarnation); err != nil {
		return nil, err
	}
	reconnect := backoff.Config{BaseDelay: firstWait, Multiplier: 1.6, Jitter: 0.2, MaxDelay: longestWait}
	conn, err := grpc.Dial(address,
		grpc.WithInsecure(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 5 * time.Second}),
		// A host that is gone says nothing; without pings, who waits at the barrier would wait for ever.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 10 * time.Second}))
	if err != nil {
		return nil, err
	}
	server := pb.NewParameterServerClient(conn)
	return &session{conn: conn, server: server, workerID: workerID, incarnation: incarnation}, nil
}

// initialize offers values for the center. If the answer is that it was set before, pull.
func (s *session) initialize(ctx context.Context, manifest *pb.Manifest, globalStep uint64, values [][]byte) (
	response *pb.InitializeResponse, err error) {
	header := &pb.InitializeHeader{WorkerId: s.workerID, Manifest: manifest, GlobalStep: globalStep}
	fragments := cut(flatten(values), manifest.FragmentSizeBytes)
	err = retry(ctx, func() error {
		response, err = s.initializeOnce(ctx, header, fragments)
		return err
	})
	if err != nil || !response.Initialized {
		return response, err
	}
	s.layout, err = newLayout(manifest)
	s.manifestID, s.baseStep = response.ManifestId, response.GlobalStep
	return response, err
}

func (s *session) initializeOnce(ctx context.Context, header *pb.InitializeHeader, fragments []*pb.Fragment) (
	*pb.InitializeResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.server.Initialize(ctx)
	if err != nil {
		return nil, failed(err, nil)
	}
	err = stream.Send(&pb.InitializeRequest{Message: &pb.InitializeRequest_Header{Header: header}})
	for i := 0; i < len(fragments) && err == nil; i++ {
		err = stream.Send(&pb.InitializeRequest{Message: &pb.InitializeRequest_Fragment{Fragment: fragments[i]}})
	}
	if err != nil && err != io.EOF { // EOF: the server has answered already
		return nil, failed(err, nil)
	}
	response, err := stream.CloseAndRecv()
	if err != nil {
		return nil, failed(err, stream.Trailer())
	}
	return response, nil
}

// pull reads the center to train from it: the bytes of each variable. It waits for the chief if it is told to.
func (s *session) pull(ctx context.Context, waitInitialized bool) (center [][]byte, err error) {
	// A worker that had finished in an earlier run counts again from here on, not only from its push on.
	request := &pb.PullRequest{WorkerId: s.workerID, WaitInitialized: waitInitialized, WillTrain: true}
	err = retry(ctx, func() error {
		center, err = s.pullOnce(ctx, request)
		return err
	})
	return center, err
}

func (s *session) pullOnce(ctx context.Context, request *pb.PullRequest) ([][]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.server.Pull(ctx, request)
	if err != nil {
		return nil, failed(err, nil)
	}
	var header *pb.CenterHeader
	var received *assembly
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, failed(err, stream.Trailer())
		}
		switch {
		case (header == nil) != (response.GetHeader() != nil):
			return nil, refuse("the header did not come first, or came again")
		case header == nil:
			header = response.GetHeader()
			layout, err := newLayout(header.Manifest)
			if err != nil {
				return nil, err
			}
			received = &assembly{layout: layout}
		case response.GetFragment() != nil:
			if err := received.add(response.GetFragment()); err != nil {
				return nil, err
			}
		}
	}
	if header == nil {
		return nil, refuse("the stream ended without a header")
	}
	center, err := received.finish()
	if err == nil {
		s.layout, s.manifestID, s.baseStep = received.layout, header.ManifestId, header.GlobalStep
	}
	return center, err
}

// push gives the bytes of each variable to the average, waits at the barrier, and returns the new center. Whatever the
// outcome, what is trained next starts from there.
func (s *session) push(ctx context.Context, values [][]byte) (outcome *pb.PushOutcome, center [][]byte, err error) {
	if s.layout == nil {
		return nil, nil, refuse("no center is known: pull first")
	}
	if err := s.layout.check(values); err != nil {
		return nil, nil, err
	}
	s.pushID++
	// The same header and bytes for all attempts: so the server knows that it is one push.
	header := &pb.PushHeader{WorkerId: s.workerID, Incarnation: s.incarnation, PushId: s.pushID, IsChief: s.isChief,
		BaseStep: s.baseStep, ManifestId: s.manifestID, HalfDuplex: true}
	fragments := cut(flatten(values), s.layout.manifest.FragmentSizeBytes)
	err = retry(ctx, func() error {
		outcome, center, err = s.pushOnce(ctx, header, fragments)
		return err
	})
	if err == nil {
		s.baseStep = outcome.GlobalStep
	}
	return outcome, center, err
}

// pushOnce is half-duplex: it writes all, half-closes, and reads all.
func (s *session) pushOnce(ctx context.Context, header *pb.PushHeader, fragments []*pb.Fragment) (
	outcome *pb.PushOutcome, center [][]byte, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.server.PushAndAverage(ctx)
	if err != nil {
		return nil, nil, failed(err, nil)
	}
	err = stream.Send(&pb.PushAndAverageRequest{Header: header})
	for i := 0; i < len(fragments) && err == nil; i++ {
		err = stream.Send(&pb.PushAndAverageRequest{Fragment: fragments[i]})
	}
	stream.CloseSend() // a call that is over takes no more: Recv says why
	received := &assembly{layout: s.layout}
	for {
		response, err := stream.Recv()
		switch {
		case err == io.EOF && outcome == nil:
			return nil, nil, refuse("the stream ended without an outcome")
		case err == io.EOF:
			center, err = received.finish()
			return outcome, center, err
		case err != nil:
			return nil, nil, failed(err, stream.Trailer())
		case outcome != nil:
			return nil, nil, refuse("a message came after the outcome")
		case response.Fragment != nil:
			if err := received.add(response.Fragment); err != nil {
				return nil, nil, err
			}
		case response.Outcome != nil:
			if outcome = response.Outcome; !goesOn[outcome.Outcome] {
				return nil, nil, refuse("the outcome %d is unknown to this client", outcome.Outcome)
			}
		}
	}
}

// status tells what the server does.
func (s *session) status(ctx context.Context) (response *pb.GetStatusResponse, err error) {
	err = retry(ctx, func() error {
		var trailer metadata.MD
		if response, err = s.server.GetStatus(ctx, &pb.GetStatusRequest{}, grpc.Trailer(&trailer)); err != nil {
			return failed(err, trailer)
		}
		return nil
	})
	return response, err
}

// leave tells the server that this process goes, and whether it has finished its training: then no round waits for it
// any longer.
func (s *session) leave(ctx context.Context, finished bool) error {
	return retry(ctx, func() error {
		var trailer metadata.MD
		request := &pb.LeaveRequest{WorkerId: s.workerID, Incarnation: s.incarnation, Finished: finished}
		if _, err := s.server.Leave(ctx, request, grpc.Trailer(&trailer)); err != nil {
			return failed(err, trailer)
		}
		return nil
	})
}
