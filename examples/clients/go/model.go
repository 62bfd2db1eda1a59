package main

import (
	"encoding/binary"
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"strconv"
)

const (
	pixels       = 64
	classes      = 10
	pixelMax     = 16
	learningRate = 0.5
)

type digit struct {
	label  int
	pixels [pixels]float64 // from 0 to 1
}

// readDigits reads rows of a label and 64 pixels.
func readDigits(path string) ([]digit, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	rows, err := csv.NewReader(file).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	digits := make([]digit, len(rows))
	for i, row := range rows {
		label, err := strconv.Atoi(row[0])
		if err != nil || label < 0 || label >= classes || len(row) != 1+pixels {
			return nil, fmt.Errorf("%s: row %d is not a label from 0 to 9 and %d pixels", path, i, pixels)
		}
		digits[i].label = label
		for j, text := range row[1:] {
			pixel, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: row %d: %w", path, i, err)
			}
			digits[i].pixels[j] = pixel / pixelMax
		}
	}
	return digits, nil
}

// A model is softmax regression.
type model struct {
	weights [pixels][classes]float64
	bias    [classes]float64
}

func newModel() *model { return &model{} }

// scores are the probabilities of the classes, and which is the highest.
func (m *model) scores(d *digit) (p [classes]float64, best int) {
	p = m.bias
	for i, pixel := range d.pixels {
		for k := range p {
			p[k] += pixel * m.weights[i][k]
		}
	}
	for k := range p {
		if p[k] > p[best] {
			best = k
		}
	}
	highest, sum := p[best], 0.0
	for k := range p {
		p[k] = math.Exp(p[k] - highest)
		sum += p[k]
	}
	for k := range p {
		p[k] /= sum
	}
	return p, best
}

// step descends once along the gradient of the mean cross-entropy.
func (m *model) step(digits []digit) {
	var gradient model
	for i := range digits {
		d := &digits[i]
		errors, _ := m.scores(d)
		errors[d.label]--
		for k, e := range errors {
			gradient.bias[k] += e
		}
		for j, pixel := range d.pixels {
			for k, e := range errors {
				gradient.weights[j][k] += pixel * e
			}
		}
	}
	scale := learningRate / float64(len(digits))
	for k := range m.bias {
		m.bias[k] -= scale * gradient.bias[k]
	}
	for j := range m.weights {
		for k := range m.weights[j] {
			m.weights[j][k] -= scale * gradient.weights[j][k]
		}
	}
}

// accuracy is the share of digits whose label has the highest score.
func (m *model) accuracy(digits []digit) float64 {
	right := 0
	for i := range digits {
		if _, best := m.scores(&digits[i]); best == digits[i].label {
			right++
		}
	}
	return float64(right) / float64(len(digits))
}

// bytes are the variables as the server wants them: weights, bias.
func (m *model) bytes() [][]byte {
	weights := make([]byte, 0, pixels*classes*8)
	for j := range m.weights {
		weights = append(weights, floatBytes(m.weights[j][:])...)
	}
	return [][]byte{weights, floatBytes(m.bias[:])}
}

// set takes over what bytes gives.
func (m *model) set(values [][]byte) {
	for j := range m.weights {
		setFloats(m.weights[j][:], values[0][j*classes*8:])
	}
	setFloats(m.bias[:], values[1])
}

func floatBytes(numbers []float64) []byte {
	data := make([]byte, 8*len(numbers))
	for i, number := range numbers {
		binary.LittleEndian.PutUint64(data[8*i:], math.Float64bits(number))
	}
	return data
}

func setFloats(numbers []float64, data []byte) {
	for i := range numbers {
		numbers[i] = math.Float64frombits(binary.LittleEndian.Uint64(data[8*i:]))
	}
}
