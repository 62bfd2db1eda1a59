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
	retryFor     = 30 * time.Second // how long a server may be away, or a worker id in use
	firstWait    = 100 * time.Millisecond
	longestWait  = 2 * time.Second
	reasonKey    = "modelaverage-reason"
	reasonPrefix = "ERROR_REASON_"
)

// A failure is a call that was refused, or that broke.
type failure struct {
	name    string // the reason, else the gRPC status, or CLIENT if this client refuses what the server sent
	message string // for people, one line
	away    bool   // the server is not there; it may come back
}

func (f *failure) Error() string { return f.name + ": " + f.message }

// refuse is a failure that this client found.
func refuse(format string, args ...interface{}) error {
	return &failure{name: "CLIENT", message: fmt.Sprintf(format, args...)}
}

// failed makes a failure of what a call ended with.
func failed(err error, trailer metadata.MD) error {
	ended := status.Convert(err)
	f := &failure{
		name:    code.Code_name[int32(ended.Code())],
		message: strings.Join(strings.Fields(ended.Message()), " "),
	}
	for _, reason := range trailer.Get(reasonKey) {
		if number := pb.ErrorReason_value[reason]; number != 0 {
			f.name = strings.TrimPrefix(reason, reasonPrefix)
		}
		f.away = ended.Code() == codes.Unavailable
		return f
	}
	// No reason: this is gRPC's own word. A stream that broke off is a server that is away, whatever gRPC calls it.
	if ended.Code() == codes.Unavailable || strings.Contains(f.message, "RST_STREAM") ||
		ended.Code() == codes.Internal && strings.Contains(f.message, "without sending trailers") {
		f.name, f.away = "UNAVAILABLE", true
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

// retry makes an attempt again while the server is away, and after failures of the names in `later`, for `retryFor`
// at most. After failures of the names in `atOnce` it does not even wait.
func retry(ctx context.Context, atOnce, later []string, attempt func() error) error {
	var since time.Time // the first failure of those that are not over
	wait := firstWait
	for {
		began := time.Now()
		err := attempt()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if hasName(err, atOnce...) {
			since, wait = time.Time{}, firstWait
			continue
		}
		var f *failure
		if !hasName(err, later...) && !(errors.As(err, &f) && f.away) {
			return err
		}
		if since.IsZero() || time.Since(began) > retryFor { // an attempt that long had found the server again
			since, wait = time.Now(), firstWait
		}
		if time.Since(since) > retryFor {
			return err
		}
		// By chance up to half as long again, so that workers do not come back all at once.
		select {
		case <-time.After(wait + time.Duration(rand.Int63n(int64(wait)/2))):
		case <-ctx.Done():
			return ctx.Err()
		}
		if wait *= 2; wait > longestWait {
			wait = longestWait
		}
	}
}
