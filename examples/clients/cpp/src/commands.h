// What the program can do: be played by the conformance kit, and train.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "worker.h"

namespace client {

/// Answers every line of `in` with a line of `out`, until `in` ends (docs/conformance.md).
void Conform(Worker& worker, std::istream& in, std::ostream& out);

struct TrainOptions {
  /// A csv file; a row is a label and 64 pixels from 0 to 16.
  std::string data;
  /// This worker trains on the rows whose number leaves `part` when divided by `num_parts`.
  std::uint64_t part = 0;
  std::uint64_t num_parts = 1;
  /// Training ends at this global_step.
  std::uint64_t rounds = 0;
};

/// Softmax regression on the digits (examples/clients/README.md). Returns the line that says how it went. Throws
/// Failure, and std::runtime_error if the data is of no use.
std::string Train(Worker& worker, const TrainOptions& options);

}  // namespace client
