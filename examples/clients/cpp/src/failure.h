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
  /// `action`: what to do: "again", "later" or "pull"; anything else means stop.
  Failure(std::string name, const std::string& message, std::string action = "stop")
      : std::runtime_error(message), name_(std::move(name)), action_(std::move(action)) {}

  const std::string& name() const { return name_; }
  const std::string& action() const { return action_; }

 private:
  std::string name_;
  std::string action_;
};

/// The client refuses what it was given, or what the server sent.
inline Failure Refusal(const std::string& message) { return {"CLIENT", message}; }

}  // namespace client
