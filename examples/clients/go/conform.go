package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	pb "modelaverage/v1"
)

// conform obeys the conformance kit's commands until its lines end.
func conform(ctx context.Context, s *session, in io.Reader, out io.Writer) error {
	lines := make(chan string)
	go readLines(in, lines)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case line, more := <-lines:
			if !more {
				return nil
			}
			answer, err := obey(ctx, s, strings.Fields(line))
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if _, err := fmt.Fprintln(out, answerLine(answer, err)); err != nil {
				return err
			}
		}
	}
}

// readLines gives lines of any length: a bufio.Scanner has a limit.
func readLines(in io.Reader, lines chan<- string) {
	defer close(lines)
	reader := bufio.NewReader(in)
	for {
		line, err := reader.ReadString('\n')
		if err != nil {
			return
		}
		lines <- line
	}
}

func answerLine(answer []string, err error) string {
	var f *failure
	switch {
	case err == nil:
		return strings.Join(append([]string{"ok"}, answer...), " ")
	case errors.As(err, &f):
		return "error " + f.name + " " + f.message
	default:
		return "error CLIENT " + err.Error()
	}
}

func obey(ctx context.Context, s *session, words []string) ([]string, error) {
	switch {
	case len(words) >= 3 && words[0] == "initialize":
		return obeyInitialize(ctx, s, words[1:])
	case len(words) == 2 && words[0] == "pull" && (words[1] == "wait" || words[1] == "now"):
		center, err := s.pull(ctx, words[1] == "wait")
		if err != nil {
			return nil, err
		}
		return append([]string{decimal(s.baseStep)}, centerWords(s.layout, center)...), nil
	case len(words) >= 1 && words[0] == "push":
		return obeyPush(ctx, s, words[1:])
	case len(words) == 1 && words[0] == "status":
		status, err := s.status(ctx)
		if err != nil {
			return nil, err
		}
		return []string{enumWord(status.Phase.String(), "PHASE_"), decimal(status.GlobalStep)}, nil
	case len(words) == 1 && words[0] == "leave":
		return nil, s.leave(ctx, false)
	case len(words) == 1 && words[0] == "finish":
		return nil, s.leave(ctx, true)
	default:
		return nil, refuse("unknown command: %.80q", strings.Join(words, " "))
	}
}

func obeyInitialize(ctx context.Context, s *session, words []string) ([]string, error) {
	globalStep, err := strconv.ParseUint(words[0], 10, 64)
	if err != nil {
		return nil, err
	}
	fragmentSize, err := strconv.ParseUint(words[1], 10, 32)
	if err != nil {
		return nil, err
	}
	manifest := &pb.Manifest{FragmentSizeBytes: uint32(fragmentSize)}
	var values [][]byte
	for _, word := range words[2:] {
		variable, value, err := parseVariable(word)
		if err != nil {
			return nil, err
		}
		manifest.Variables, values = append(manifest.Variables, variable), append(values, value)
	}
	response, err := s.initialize(ctx, manifest, globalStep, values)
	if err != nil {
		return nil, err
	}
	if !response.Initialized {
		return []string{"already", decimal(response.GlobalStep)}, nil
	}
	return []string{"initialized", decimal(response.GlobalStep)}, nil
}

func obeyPush(ctx context.Context, s *session, words []string) ([]string, error) {
	var values [][]byte
	for _, word := range words {
		value, err := parseBytes(word)
		if err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	outcome, center, err := s.push(ctx, values)
	if err != nil {
		return nil, err
	}
	contributors := strings.Join(outcome.Contributors, ",")
	if contributors == "" {
		contributors = "-"
	}
	answer := []string{enumWord(outcome.Outcome.String(), "OUTCOME_"), decimal(outcome.GlobalStep), contributors}
	return append(answer, centerWords(s.layout, center)...), nil
}

// parseVariable reads NAME:TYPE:SHAPE:BYTES.
func parseVariable(word string) (*pb.Variable, []byte, error) {
	parts := strings.Split(word, ":")
	if len(parts) != 4 {
		return nil, nil, refuse("not NAME:TYPE:SHAPE:BYTES: %.80q", word)
	}
	name, err := hex.DecodeString(parts[0])
	if err != nil {
		return nil, nil, err
	}
	dataType, known := dataTypes[parts[1]]
	if !known {
		return nil, nil, refuse("unknown type %.80q", parts[1])
	}
	variable := &pb.Variable{Name: string(name), DataType: dataType}
	for _, text := range strings.FieldsFunc(parts[2], func(r rune) bool { return r == ',' }) {
		extent, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, nil, err
		}
		variable.Shape = append(variable.Shape, extent)
	}
	value, err := parseBytes(parts[3])
	return variable, value, err
}

func parseBytes(word string) ([]byte, error) {
	if word == "-" {
		return nil, nil
	}
	return hex.DecodeString(word)
}

// centerWords writes the center as NAME:TYPE:SHAPE:BYTES.
func centerWords(l *layout, center [][]byte) []string {
	words := make([]string, len(center))
	for i, variable := range l.manifest.Variables {
		var typeName string
		for name, dataType := range dataTypes {
			if dataType == variable.DataType {
				typeName = name
			}
		}
		extents := make([]string, len(variable.Shape))
		for j, extent := range variable.Shape {
			extents[j] = strconv.FormatInt(extent, 10)
		}
		value := "-"
		if len(center[i]) > 0 {
			value = hex.EncodeToString(center[i])
		}
		words[i] = fmt.Sprintf("%x:%s:%s:%s", variable.Name, typeName, strings.Join(extents, ","), value)
	}
	return words
}

// enumWord makes "averaging" of PHASE_AVERAGING.
func enumWord(name, prefix string) string { return strings.ToLower(strings.TrimPrefix(name, prefix)) }

func decimal(number uint64) string { return strconv.FormatUint(number, 10) }
