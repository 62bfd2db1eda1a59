// The line protocol of the conformance kit (docs/conformance.md).
#pragma once

#include <istream>
#include <ostream>

#include "worker.h"

namespace client {

/// Answers every line of `in` with a line of `out`, until `in` ends.
void Conform(Worker& worker, std::istream& in, std::ostream& out);

}  // namespace client
