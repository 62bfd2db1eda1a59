#include "layout.h"

#include <algorithm>

#include "failure.h"

namespace client {
namespace {

constexpr std::size_t kAlignment = 8;
constexpr std::size_t kMaxFragmentSize = 2 << 20;
constexpr std::size_t kMaxFragments = 262'144;

std::size_t ElementSize(const v1::Variable& variable) {
  switch (variable.data_type()) {
    case v1::DATA_TYPE_FLOAT64:
      return 8;
    case v1::DATA_TYPE_FLOAT32:
      return 4;
    case v1::DATA_TYPE_FLOAT16:
    case v1::DATA_TYPE_BFLOAT16:
      return 2;
    default:
      throw Refusal("variable '" + variable.name() + "' has an unknown data type");
  }
}

std::size_t VariableSize(const v1::Variable& variable) {
  std::size_t size = ElementSize(variable);
  if (std::ranges::find(variable.shape(), 0) != variable.shape().end()) return 0;
  for (const std::int64_t extent : variable.shape()) {
    if (extent < 0 || __builtin_mul_overflow(size, static_cast<std::size_t>(extent), &size) ||
        size > kMaxFragments * kMaxFragmentSize) {
      throw Refusal("variable '" + variable.name() + "' has an impossible shape");
    }
  }
  return size;
}

}  // namespace

Layout::Layout(const v1::Manifest& manifest) : fragment_size_bytes_(manifest.fragment_size_bytes()) {
  if (manifest.has_shard()) {
    throw Refusal("the server keeps one of " + std::to_string(manifest.shard().count()) +
                  " parts of the model; this client works with one server only");
  }
  if (fragment_size_bytes_ == 0 || fragment_size_bytes_ % kAlignment != 0 || fragment_size_bytes_ > kMaxFragmentSize) {
    throw Refusal("fragments of " + std::to_string(fragment_size_bytes_) + " bytes: not a multiple of 8 up to 2 MiB");
  }
  for (const v1::Variable& variable : manifest.variables()) {
    const std::size_t size = VariableSize(variable);
    // An empty variable lies nowhere: it must not make the buffer longer.
    const std::size_t offset = size == 0 ? size_bytes_ : (size_bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    variables_.push_back({offset, size});
    size_bytes_ = offset + size;
    if (size_bytes_ > kMaxFragments * fragment_size_bytes_) throw Refusal("the model has more than 262144 fragments");
  }
}

std::uint32_t Layout::num_fragments() const {
  return static_cast<std::uint32_t>((size_bytes_ + fragment_size_bytes_ - 1) / fragment_size_bytes_);
}

Range Layout::fragment(std::uint32_t index) const {
  const std::size_t offset = index * fragment_size_bytes_;
  return {offset, std::min(fragment_size_bytes_, size_bytes_ - offset)};
}

std::string Layout::Flat(const std::vector<std::string>& variables) const {
  if (variables.size() != variables_.size()) {
    throw Refusal(std::to_string(variables.size()) + " variables given, the manifest has " +
                  std::to_string(variables_.size()));
  }
  std::string flat(size_bytes_, '\0');
  for (std::size_t i = 0; i < variables.size(); ++i) {
    if (variables[i].size() != variables_[i].size) {
      throw Refusal("variable " + std::to_string(i) + " has " + std::to_string(variables[i].size()) +
                    " bytes, the manifest says " + std::to_string(variables_[i].size));
    }
    std::ranges::copy(variables[i], flat.begin() + static_cast<std::ptrdiff_t>(variables_[i].offset));
  }
  return flat;
}

}  // namespace client
