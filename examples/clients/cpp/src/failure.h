// What goes wrong, for programs and for people.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace client {

/// A command that failed. what() is one line for people.
class Failure : public std::runtime_error {
 public:
  /// `name`: the server's reason without ERROR_REASON_, or the name of the gRPC status.
  /// `away`: the server cannot be reached, or went in the middle of the call; it may come back.
  Failure(std::string name, const std::string& message, bool away = false)
      : std::runtime_error(message), name_(std::move(name)), away_(away) {}

  const std::string& name() const { return name_; }
  bool away() const { return away_; }

 private:
  std::string name_;
  bool away_;
};

/// The client refuses what it was given, or what the server sent.
inline Failure Refusal(const std::string& message) { return {"CLIENT", message}; }

}  // namespace client
