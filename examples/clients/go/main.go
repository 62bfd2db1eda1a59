// A client of a model-averaging parameter server: "conform" lets the conformance kit play it, "train" is a worker.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const (
	usage = `usage: client conform ADDRESS WORKER_ID
       client train --server ADDRESS --worker-id ID --data FILE --part I/N --rounds N [--chief]
ADDRESS is HOST:PORT
`
	leaveTimeout = 2 * time.Second
)

func main() {
	run, address, workerID, isTraining := parse(os.Args[1:])
	s, err := connect(address, workerID)
	if err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
	ctx, stop := context.WithCancel(context.Background())
	signals, exitStatus := make(chan os.Signal, 1), make(chan int, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		number := (<-signals).(syscall.Signal)
		exitStatus <- 128 + int(number)
		stop()
	}()

	err = run(ctx, s)
	if isTraining && err != nil || ctx.Err() != nil { // who has trained to the end has said so
		goodbye, cancel := context.WithTimeout(context.Background(), leaveTimeout)
		s.leave(goodbye, false) // a server that does not hear it notices by itself
		cancel()
	}
	switch {
	case errors.Is(err, context.Canceled):
		os.Exit(<-exitStatus)
	case err != nil:
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

// parse gives the command to run. Wrong arguments end the program.
func parse(arguments []string) (run func(context.Context, *session) error, address, workerID string, isTraining bool) {
	switch {
	case len(arguments) == 3 && arguments[0] == "conform":
		address, workerID = arguments[1], arguments[2]
		run = func(ctx context.Context, s *session) error { return conform(ctx, s, os.Stdin, os.Stdout) }
	case len(arguments) > 0 && arguments[0] == "train":
		options := parseTrain(arguments[1:])
		address, workerID, isTraining = options.server, options.workerID, true
		run = func(ctx context.Context, s *session) error { return train(ctx, s, options) }
	default:
		wrongArguments("")
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		wrongArguments(err.Error())
	}
	return run, address, workerID, isTraining
}

func parseTrain(arguments []string) (options trainOptions) {
	flags := flag.NewFlagSet("train", flag.ExitOnError) // exits with 2 itself
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flags.StringVar(&options.server, "server", "", "")
	flags.StringVar(&options.workerID, "worker-id", "", "")
	flags.StringVar(&options.dataPath, "data", "", "")
	flags.Uint64Var(&options.rounds, "rounds", 0, "")
	flags.BoolVar(&options.isChief, "chief", false, "")
	part := flags.String("part", "", "")
	flags.Parse(arguments)
	if count, err := fmt.Sscanf(*part+"\n", "%d/%d\n", &options.part, &options.parts); count != 2 || err != nil ||
		options.part < 0 || options.part >= options.parts {
		wrongArguments(fmt.Sprintf("--part %q is not I/N with I from 0 to N - 1", *part))
	}
	if flags.NArg() > 0 || options.workerID == "" || options.dataPath == "" || options.rounds == 0 {
		wrongArguments("")
	}
	return options
}

func wrongArguments(problem string) {
	if problem != "" {
		fmt.Fprintln(os.Stderr, "client:", problem)
	}
	fmt.Fprint(os.Stderr, usage)
	os.Exit(2)
}
