package main

import (
	"bytes"
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
			return nil, fmt.Errorf("%s: row %d is not a label from 0 to %d and %d pixels", path, i, classes-1, pixels)
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

// probabilities of the classes, and which is the most probable.
func (m *model) probabilities(d *digit) (p [classes]float64, best int) {
	p = m.bias
	for j, pixel := range d.pixels {
		for k := range p {
			p[k] += pixel * m.weights[j][k]
		}
	}
	for k := range p {
		if p[k] > p[best] {
			best = k
		}
	}
	sum, highest := 0.0, p[best]
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
	var gradient model // of the sum
	for i := range digits {
		wrong, _ := m.probabilities(&digits[i])
		wrong[digits[i].label]--
		for k := range wrong {
			gradient.bias[k] += wrong[k]
			for j, pixel := range digits[i].pixels {
				gradient.weights[j][k] += pixel * wrong[k]
			}
		}
	}
	rate := learningRate / float64(len(digits))
	for k := range m.bias {
		m.bias[k] -= rate * gradient.bias[k]
		for j := range m.weights {
			m.weights[j][k] -= rate * gradient.weights[j][k]
		}
	}
}

// accuracy is the share of digits whose label is the most probable.
func (m *model) accuracy(digits []digit) float64 {
	right := 0
	for i := range digits {
		if _, best := m.probabilities(&digits[i]); best == digits[i].label {
			right++
		}
	}
	return float64(right) / float64(len(digits))
}

// bytes are those of the variables, in the order of the manifest.
func (m *model) bytes() [][]byte {
	var weights, bias bytes.Buffer
	binary.Write(&weights, binary.LittleEndian, &m.weights) // cannot fail: numbers, in memory
	binary.Write(&bias, binary.LittleEndian, &m.bias)
	return [][]byte{weights.Bytes(), bias.Bytes()}
}

// set takes over a center of the model's own manifest.
func (m *model) set(center [][]byte) {
	binary.Read(bytes.NewReader(center[0]), binary.LittleEndian, &m.weights)
	binary.Read(bytes.NewReader(center[1]), binary.LittleEndian, &m.bias)
}
