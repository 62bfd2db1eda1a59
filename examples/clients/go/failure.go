package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "modelaverage/v1"
)

const (
	retryFor    = 30 * time.Second // how long a server may be away, or a worker id in use
	firstWait   = 100 * time.Millisecond
	longestWait = 2 * time.Second
)

// A failure is a call that was refused, or that broke.
type failure struct {
	name    string // the reason, else the gRPC status; CLIENT if this client refuses what came
	message string // for people, one line
	away    bool   // the server is not there; it may come back
}

func (f *failure) Error() string { return f.name + ": " + f.message }

// refuse makes a failure of what this client cannot accept.
func refuse(format string, args ...interface{}) error {
	return &failure{name: "CLIENT", message: fmt.Sprintf(format, args...)}
}

// failed makes a failure of what a call ended with.
func failed(err error, trailer metadata.MD) error {
	ended := status.Convert(err)
	f := &failure{
		name:    code.Code_name[int32(ended.Code())],
		message: strings.Join(strings.Fields(ended.Message()), " "),
		away:    ended.Code() == codes.Unavailable,
	}
	reasons := trailer.Get("modelaverage-reason")
	switch {
	case f.away: // SERVER_STOPPING, too
	case len(reasons) > 0:
		if pb.ErrorReason_value[reasons[0]] != 0 { // else of a later version: known by its status
			f.name = strings.TrimPrefix(reasons[0], "ERROR_REASON_")
		}
	case strings.Contains(f.message, "RST_STREAM"), strings.Contains(f.message, "without sending trailers"):
		f.name, f.away = "UNAVAILABLE", true // the stream broke off, whatever gRPC calls it
	}
	return f
}

// hasName says whether an error is a failure of one of these names.
func hasName(err error, names ...string) bool {
	var f *failure
	if errors.As(err, &f) {
		for _, name := range names {
			if f.name == name {
				return true
			}
		}
	}
	return false
}

// retry makes an attempt again as often as the protocol says that it may help: at once if the push has to be made
// again, for `retryFor` at most if the server is away or has not noticed yet that this worker's last process is dead.
func retry(ctx context.Context, attempt func() error) error {
	var since time.Time // the first failure of those that are not over
	for wait := firstWait; ; {
		began := time.Now()
		err := attempt()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var f *failure
		switch {
		case hasName(err, "ROUND_RESTARTED", "STREAM_STALLED"):
			since = time.Time{}
			continue
		case hasName(err, "WORKER_ID_IN_USE"), errors.As(err, &f) && f.away:
		default:
			return err // or nil
		}
		if since.IsZero() || time.Since(began) > retryFor { // so long an attempt had found the server again
			since, wait = time.Now(), firstWait
		}
		if time.Since(since) > retryFor {
			return err
		}
		select {
		// By chance up to half as long again, so that workers do not come back all at once.
		case <-time.After(wait + time.Duration(rand.Int63n(int64(wait)/2))):
		case <-ctx.Done():
			return ctx.Err()
		}
		if wait *= 2; wait > longestWait {
			wait = longestWait
		}
	}
}
