#include "commands.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "failure.h"

namespace client {
namespace {

constexpr std::size_t kPixels = 64;
constexpr std::size_t kClasses = 10;
constexpr std::size_t kWeights = kPixels * kClasses;
constexpr std::uint32_t kFragmentSizeBytes = 1024;
constexpr int kStepsPerRound = 10;
constexpr double kLearningRate = 0.5;
constexpr std::uint64_t kRoundsPerReport = 10;

static_assert(std::endian::native == std::endian::little, "the flat buffer is little-endian");

struct Row {
  std::size_t label;
  std::array<double, kPixels> pixels;
};

/// weights [64, 10], row-major, then bias [10]: both float64, so this is the flat buffer, too.
using Model = std::array<double, kWeights + kClasses>;

std::string_view AsBytes(const Model& model) { return {reinterpret_cast<const char*>(model.data()), sizeof model}; }

Model AsModel(std::string_view flat) {
  Model model;
  std::memcpy(model.data(), flat.data(), sizeof model);
  return model;
}

v1::Manifest ModelManifest() {
  v1::Manifest manifest;
  manifest.set_fragment_size_bytes(kFragmentSizeBytes);
  v1::Variable* weights = manifest.add_variables();
  weights->set_name("weights");
  weights->set_data_type(v1::DATA_TYPE_FLOAT64);
  weights->add_shape(kPixels);
  weights->add_shape(kClasses);
  v1::Variable* bias = manifest.add_variables();
  bias->set_name("bias");
  bias->set_data_type(v1::DATA_TYPE_FLOAT64);
  bias->add_shape(kClasses);
  return manifest;
}

/// Any fragment size will do, as long as the variables are the same.
void RequireOurModel(v1::Manifest manifest) {
  manifest.set_fragment_size_bytes(kFragmentSizeBytes);
  if (manifest.SerializeAsString() != ModelManifest().SerializeAsString()) {
    throw Refusal("the server keeps another model: " + manifest.ShortDebugString());
  }
}

std::vector<Row> ReadRows(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<Row> rows;
  for (std::string line; std::getline(file, line);) {
    std::ranges::replace(line, ',', ' ');
    std::istringstream numbers(line);
    Row row;
    numbers >> row.label;
    for (double& pixel : row.pixels) {
      numbers >> pixel;
      pixel /= 16;
    }
    if (!numbers || row.label >= kClasses) {
      throw std::runtime_error(path + ", row " + std::to_string(rows.size()) + ": not a label and 64 pixels");
    }
    rows.push_back(row);
  }
  return rows;
}

std::array<double, kClasses> Logits(const Model& model, const Row& row) {
  std::array<double, kClasses> logits;
  std::copy_n(model.begin() + kWeights, kClasses, logits.begin());
  for (std::size_t i = 0; i < kPixels; ++i) {
    for (std::size_t k = 0; k < kClasses; ++k) logits[k] += row.pixels[i] * model[i * kClasses + k];
  }
  return logits;
}

/// One step along the gradient of the mean cross-entropy.
void Step(Model& model, const std::vector<Row>& rows) {
  Model gradient{};
  for (const Row& row : rows) {
    auto errors = Logits(model, row);
    const double largest = *std::ranges::max_element(errors);
    double sum = 0;
    for (double& error : errors) sum += error = std::exp(error - largest);
    for (double& error : errors) error /= sum;
    errors[row.label] -= 1;
    for (std::size_t i = 0; i < kPixels; ++i) {
      for (std::size_t k = 0; k < kClasses; ++k) gradient[i * kClasses + k] += row.pixels[i] * errors[k];
    }
    for (std::size_t k = 0; k < kClasses; ++k) gradient[kWeights + k] += errors[k];
  }
  const double scale = kLearningRate / static_cast<double>(rows.size());
  for (std::size_t i = 0; i < model.size(); ++i) model[i] -= scale * gradient[i];
}

double Accuracy(const Model& model, const std::vector<Row>& rows) {
  const auto right = std::ranges::count_if(rows, [&](const Row& row) {
    const auto logits = Logits(model, row);
    return static_cast<std::size_t>(std::ranges::max_element(logits) - logits.begin()) == row.label;
  });
  return static_cast<double>(right) / static_cast<double>(rows.size());
}

std::string Report(const Worker& worker, const Model& model, const std::vector<Row>& rows) {
  std::array<char, 16> accuracy;
  std::snprintf(accuracy.data(), accuracy.size(), "%.4f", Accuracy(model, rows));
  return "global_step " + std::to_string(worker.global_step()) + ", accuracy " + accuracy.data();
}

/// The center to go on from: the one that came, whatever the outcome, or the server's, if that has another past.
std::string Average(Worker& worker, std::string_view flat) try {
  return worker.PushAndAverage(flat).center;
} catch (const Failure& failure) {
  if (failure.action() != "pull") throw;
  return worker.Pull(/*wait=*/true);
}

}  // namespace

std::string Train(Worker& worker, const TrainOptions& options) {
  const std::vector<Row> rows = ReadRows(options.data);
  std::vector<Row> part;
  for (std::size_t i = options.part; i < rows.size(); i += options.num_parts) part.push_back(rows[i]);
  if (part.empty()) throw std::runtime_error(options.data + " has no rows for this part");

  if (worker.is_chief()) {
    const auto zeros = [](std::size_t count) { return std::string(count * sizeof(double), '\0'); };
    worker.Initialize(0, ModelManifest(), {zeros(kWeights), zeros(kClasses)});
  }
  const std::string center = worker.Pull(/*wait=*/true);
  RequireOurModel(worker.manifest());
  Model model = AsModel(center);

  std::uint64_t rounds = 0;
  while (worker.global_step() < options.rounds) {
    for (int step = 0; step < kStepsPerRound; ++step) Step(model, part);
    model = AsModel(Average(worker, AsBytes(model)));
    if (++rounds % kRoundsPerReport == 0) std::cerr << worker.worker_id() + ": " + Report(worker, model, rows) + "\n";
  }
  worker.Finish();
  return worker.worker_id() + " (cpp): " + std::to_string(rounds) + " rounds, " + Report(worker, model, rows);
}

}  // namespace client
