package main

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
	pb "modelaverage/v1"
)

const (
	stepsPerRound    = 10
	trainFragment    = 1024 // bytes
	reportEachRounds = 10
)

type trainOptions struct {
	server, workerID, dataPath string
	part, parts                int // which rows: those whose number leaves the rest part when divided by parts
	rounds                     uint64
	isChief                    bool
}

// train is a worker: it trains on its part of the data, and averages with the others, until the center has had all rounds.
func train(ctx context.Context, s *session, options trainOptions) error {
	digits, err := readDigits(options.dataPath)
	if err != nil {
		return err
	}
	var own []digit
	for i := options.part; i < len(digits); i += options.parts {
		own = append(own, digits[i])
	}
	if len(own) == 0 {
		return fmt.Errorf("%s has %d rows, none for part %d/%d", options.dataPath, len(digits), options.part, options.parts)
	}

	m := newModel()
	manifest := &pb.Manifest{FragmentSizeBytes: trainFragment, Variables: []*pb.Variable{
		{Name: "weights", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{pixels, classes}},
		{Name: "bias", DataType: pb.DataType_DATA_TYPE_FLOAT64, Shape: []int64{classes}},
	}}
	s.isChief = options.isChief
	if options.isChief {
		if _, err := s.initialize(ctx, manifest, 0, m.bytes()); err != nil {
			return err
		}
	}
	pull := func() error {
		center, err := s.pull(ctx, true)
		if err != nil {
			return err
		}
		for i, variable := range s.layout.manifest.Variables {
			if i >= len(manifest.Variables) || !proto.Equal(variable, manifest.Variables[i]) {
				return refuse("the server has another model: %v", s.layout.manifest.Variables)
			}
		}
		m.set(center)
		return nil
	}
	if err := pull(); err != nil {
		return err
	}

	rounds := 0
	for s.baseStep < options.rounds {
		for i := 0; i < stepsPerRound; i++ {
			m.step(own)
		}
		outcome, center, err := s.push(ctx, m.bytes())
		if hasName(err, "BASE_STEP_AHEAD", "MANIFEST_UNKNOWN") { // the server came back as another: go on from what it has
			err = pull()
			if err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		m.set(center)
		rounds++
		if rounds%reportEachRounds == 0 {
			fmt.Fprintf(os.Stderr, "%s (go): global_step %d, %s, average of %v\n", s.workerID, outcome.GlobalStep,
				enumWord(outcome.Outcome.String(), "OUTCOME_"), outcome.Contributors)
		}
	}
	fmt.Printf("%s (go): %d rounds, global_step %d, accuracy %.4f\n", s.workerID, rounds, s.baseStep, m.accuracy(digits))
	return nil
}
