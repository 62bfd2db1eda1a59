// The model as bytes: where variables and fragments lie in the flat buffer. Pure, no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "modelaverage/v1/parameter_server.pb.h"

namespace client {

namespace v1 = modelaverage::v1;

/// Where something lies in the flat buffer, in bytes.
struct Range {
  std::size_t offset = 0;
  std::size_t size = 0;
};

/// What a manifest says about the flat buffer.
class Layout {
 public:
  Layout() = default;

  /// Throws Failure (CLIENT) if the manifest breaks a rule, or has a shard: this client knows one server only.
  explicit Layout(const v1::Manifest& manifest);

  std::size_t size_bytes() const { return size_bytes_; }
  const std::vector<Range>& variables() const { return variables_; }
  std::uint32_t num_fragments() const;
  Range fragment(std::uint32_t index) const;

  /// The flat buffer of these variables' bytes, in the order of the manifest. Throws Failure (CLIENT) if their number
  /// or one of their sizes is not what the manifest says.
  std::string Flat(const std::vector<std::string>& variables) const;

 private:
  std::size_t size_bytes_ = 0;
  std::size_t fragment_size_bytes_ = 8;
  std::vector<Range> variables_;
};

}  // namespace client
