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
	action  string // what to do: again, later, pull; anything else means stop
}

func (f *failure) Error() string { return f.name + ": " + f.message }

// refuse makes a failure of what this client cannot accept.
func refuse(format string, args ...interface{}) error {
	return &failure{name: "CLIENT", message: fmt.Sprintf(format, args...)}
}

// failed makes a failure of what a call ended with.
func failed(err error, trailer metadata.MD) error {
	ended := status.Convert(err)
	f := &failure{name: code.Code_name[int32(ended.Code())], message: strings.Join(strings.Fields(ended.Message()), " ")}
	actions, reasons := trailer.Get("modelaverage-action"), trailer.Get("modelaverage-reason")
	if len(reasons) > 0 && pb.ErrorReason_value[reasons[0]] != 0 { // else of a later version: known by its status
		f.name = strings.TrimPrefix(reasons[0], "ERROR_REASON_")
	}
	switch {
	case len(actions) > 0:
		f.action = actions[0]
	case ended.Code() == codes.Unavailable:
		f.action = "later"
	case strings.Contains(f.message, "RST_STREAM"), strings.Contains(f.message, "without sending trailers"):
		f.name, f.action = "UNAVAILABLE", "later" // the stream broke off, whatever gRPC calls it
	}
	return f
}

// actionOf says what to do after an error; nothing if it is not a failure.
func actionOf(err error) string {
	var f *failure
	if errors.As(err, &f) {
		return f.action
	}
	return ""
}

// retry makes an attempt again as often as its failures ask for it: "again" at once, "later" for `retryFor` at most.
func retry(ctx context.Context, attempt func() error) error {
	var since time.Time // the first failure of those that are not over
	for wait := firstWait; ; {
		began := time.Now()
		err := attempt()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch actionOf(err) {
		case "again":
			since = time.Time{}
			continue
		case "later":
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
