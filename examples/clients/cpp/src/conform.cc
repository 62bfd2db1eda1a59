#include "commands.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <exception>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "failure.h"

namespace client {
namespace {

using Words = std::vector<std::string_view>;

Words Split(std::string_view text, char separator) {
  Words words;
  for (std::size_t end; (end = text.find(separator)) != text.npos; text.remove_prefix(end + 1)) {
    words.push_back(text.substr(0, end));
  }
  words.push_back(text);
  return words;
}

template <typename Number>
Number ParseNumber(std::string_view text, int base = 10) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, base);
  if (error != std::errc{} || end != text.data() + text.size()) throw Refusal("no number: '" + std::string(text) + "'");
  return number;
}

std::string FromHex(std::string_view hex) {
  if (hex.size() % 2 != 0) throw Refusal("hex with an odd number of digits");
  std::string bytes;
  bytes.reserve(hex.size() / 2);
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(ParseNumber<unsigned char>(hex.substr(i, 2), 16)));
  }
  return bytes;
}

std::string ToHex(std::string_view bytes) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex;
  hex.reserve(bytes.size() * 2);
  for (const unsigned char byte : bytes) {
    hex += kDigits[byte / 16];
    hex += kDigits[byte % 16];
  }
  return hex;
}

std::string ParseBytes(std::string_view word) { return word == "-" ? "" : FromHex(word); }

constexpr std::array<std::pair<std::string_view, v1::DataType>, 4> kTypes = {{{"f32", v1::DATA_TYPE_FLOAT32},
                                                                               {"f64", v1::DATA_TYPE_FLOAT64},
                                                                               {"f16", v1::DATA_TYPE_FLOAT16},
                                                                               {"bf16", v1::DATA_TYPE_BFLOAT16}}};

v1::DataType ParseType(std::string_view word) {
  const auto* type = std::ranges::find(kTypes, word, &decltype(kTypes)::value_type::first);
  if (type == kTypes.end()) throw Refusal("unknown type '" + std::string(word) + "'");
  return type->second;
}

std::string TypeWord(v1::DataType type) {
  return std::string(std::ranges::find(kTypes, type, &decltype(kTypes)::value_type::second)->first);
}

/// OUTCOME_COMMITTED: "committed".
std::string EnumWord(std::string_view name, std::string_view prefix) {
  std::string word(name.substr(std::min(prefix.size(), name.size())));
  std::ranges::transform(word, word.begin(), [](unsigned char letter) { return std::tolower(letter); });
  return word;
}

/// The center as variables of the line protocol, each after a space.
std::string Variables(const Worker& worker, std::string_view flat) {
  std::string words;
  for (int i = 0; i < worker.manifest().variables_size(); ++i) {
    const v1::Variable& variable = worker.manifest().variables(i);
    words += " " + ToHex(variable.name()) + ":" + TypeWord(variable.data_type()) + ":";
    for (int axis = 0; axis < variable.shape_size(); ++axis) {
      words += (axis > 0 ? "," : "") + std::to_string(variable.shape(axis));
    }
    const Range range = worker.layout().variables()[static_cast<std::size_t>(i)];
    words += ":" + (range.size == 0 ? "-" : ToHex(flat.substr(range.offset, range.size)));
  }
  return words;
}

std::string Initialize(Worker& worker, const Words& words) {
  if (words.size() < 3) throw Refusal("usage: initialize GLOBAL_STEP FRAGMENT_SIZE_BYTES VARIABLE...");
  v1::Manifest manifest;
  std::vector<std::string> values;
  manifest.set_fragment_size_bytes(ParseNumber<std::uint32_t>(words[2]));
  for (std::size_t i = 3; i < words.size(); ++i) {
    const Words parts = Split(words[i], ':');
    if (parts.size() != 4) throw Refusal("not NAME:TYPE:SHAPE:BYTES: '" + std::string(words[i]) + "'");
    v1::Variable* variable = manifest.add_variables();
    variable->set_name(FromHex(parts[0]));
    variable->set_data_type(ParseType(parts[1]));
    if (!parts[2].empty()) {
      for (const std::string_view extent : Split(parts[2], ',')) variable->add_shape(ParseNumber<std::int64_t>(extent));
    }
    values.push_back(ParseBytes(parts[3]));
  }
  const auto response = worker.Initialize(ParseNumber<std::uint64_t>(words[1]), manifest, values);
  return (response.initialized() ? "ok initialized " : "ok already ") + std::to_string(response.global_step());
}

std::string Pull(Worker& worker, const Words& words) {
  if (words.size() != 2 || (words[1] != "wait" && words[1] != "now")) throw Refusal("usage: pull wait|now");
  const std::string flat = worker.Pull(words[1] == "wait");
  return "ok " + std::to_string(worker.global_step()) + Variables(worker, flat);
}

std::string Push(Worker& worker, const Words& words) {
  if (worker.manifest().variables().empty()) throw Refusal("a push before the first pull");
  std::vector<std::string> values;
  for (std::size_t i = 1; i < words.size(); ++i) values.push_back(ParseBytes(words[i]));
  const PushResult result = worker.PushAndAverage(worker.layout().Flat(values));
  std::string answer = "ok " + EnumWord(v1::Outcome_Name(result.outcome.outcome()), "OUTCOME_") + " " +
                       std::to_string(result.outcome.global_step()) + " ";
  if (result.outcome.contributors().empty()) answer += "-";
  for (int i = 0; i < result.outcome.contributors_size(); ++i) {
    answer += (i > 0 ? "," : "") + result.outcome.contributors(i);
  }
  return answer + Variables(worker, result.center);
}

std::string Status(Worker& worker) {
  const v1::GetStatusResponse status = worker.GetStatus();
  if (!v1::Phase_IsValid(status.phase())) throw Refusal("unknown phase " + std::to_string(status.phase()));
  return "ok " + EnumWord(v1::Phase_Name(status.phase()), "PHASE_") + " " + std::to_string(status.global_step());
}

std::string Answer(Worker& worker, std::string_view line) {
  const Words words = Split(line, ' ');
  if (words[0] == "initialize") return Initialize(worker, words);
  if (words[0] == "pull") return Pull(worker, words);
  if (words[0] == "push") return Push(worker, words);
  if (words[0] == "status") return Status(worker);
  if (words[0] == "leave") return worker.Leave(), "ok";
  if (words[0] == "finish") return worker.Finish(), "ok";
  throw Refusal("unknown command '" + std::string(words[0]) + "'");
}

}  // namespace

void Conform(Worker& worker, std::istream& in, std::ostream& out) {
  for (std::string line; std::getline(in, line);) {
    try {
      out << Answer(worker, line) << std::endl;
    } catch (const Failure& failure) {
      out << "error " << failure.name() << " " << failure.what() << std::endl;
    } catch (const std::exception& error) {
      // Out of memory, most likely: a server that claims to have a huge model.
      out << "error CLIENT " << error.what() << std::endl;
    }
  }
}

}  // namespace client
