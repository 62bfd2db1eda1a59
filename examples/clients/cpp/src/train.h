// Softmax regression on the digits: a worker that trains something (examples/clients/README.md).
#pragma once

#include <cstdint>
#include <string>

#include "worker.h"

namespace client {

struct TrainOptions {
  std::string server;
  std::string worker_id;
  /// A csv file; a row is a label and 64 pixels from 0 to 16.
  std::string data;
  /// This worker trains with the rows whose number leaves `part` when divided by `num_parts`.
  std::uint64_t part = 0;
  std::uint64_t num_parts = 1;
  /// Training ends at this global_step.
  std::uint64_t rounds = 0;
  bool is_chief = false;
};

/// Returns the line that says how it went. Throws Failure.
std::string Train(Worker& worker, const TrainOptions& options);

}  // namespace client
