package main

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
	pb "modelaverage/v1"
)

const (
	stepsPerRound   = 10
	roundsPerReport = 10
)

var digitsManifest = &pb.Manifest{FragmentSizeBytes: 1024, Variables: []*pb.Variable{
	{Name: "weights", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{pixels, classes}},
	{Name: "bias", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{classes}},
}}

type trainOptions struct {
	server, workerID, dataPath string
	part, parts                int // which rows: those whose number leaves the rest part when divided by parts
	rounds                     uint64
	isChief                    bool
}

// train is a worker: it trains on its part of the data and averages with the others, until all rounds are over; then it
// says that it has finished.
func train(ctx context.Context, s *session, options trainOptions) error {
	all, err := readDigits(options.dataPath)
	if err != nil {
		return err
	}
	var own []digit
	for i := options.part; i < len(all); i += options.parts {
		own = append(own, all[i])
	}
	if len(own) == 0 {
		return fmt.Errorf("%s: none of %d rows is in part %d/%d", options.dataPath, len(all), options.part, options.parts)
	}

	var m model
	s.isChief = options.isChief
	if options.isChief {
		if _, err := s.initialize(ctx, digitsManifest, 0, m.bytes()); err != nil {
			return err
		}
	}
	if err := pullDigits(ctx, s, &m); err != nil {
		return err
	}
	rounds := 0
	for s.baseStep < options.rounds {
		for i := 0; i < stepsPerRound; i++ {
			m.step(own)
		}
		outcome, center, err := s.push(ctx, m.bytes())
		if actionOf(err) == "pull" { // the server has another past: go on from its center
			if err := pullDigits(ctx, s, &m); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		m.set(center)
		rounds++
		if s.baseStep%roundsPerReport == 0 {
			fmt.Fprintf(os.Stderr, "%s: global_step %d, %s, accuracy %.4f\n", s.workerID, s.baseStep,
				enumWord(outcome.Outcome.String(), "OUTCOME_"), m.accuracy(all))
		}
	}
	if err := s.leave(ctx, true); err != nil {
		return err
	}
	fmt.Printf("%s (go): %d rounds, global_step %d, accuracy %.4f\n", s.workerID, rounds, s.baseStep, m.accuracy(all))
	return nil
}

// pullDigits sets the model to the center, if it is one of digits.
func pullDigits(ctx context.Context, s *session, m *model) error {
	center, err := s.pull(ctx, true)
	if err != nil {
		return err
	}
	same := len(center) == len(digitsManifest.Variables)
	for i := 0; same && i < len(center); i++ {
		same = proto.Equal(s.layout.manifest.Variables[i], digitsManifest.Variables[i])
	}
	if !same {
		return refuse("the center is another model: %v", s.layout.manifest.Variables)
	}
	m.set(center)
	return nil
}
