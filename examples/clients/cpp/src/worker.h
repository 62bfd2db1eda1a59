// A worker of the job: what it has to remember between calls, and when it tries again.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "calls.h"
#include "layout.h"

namespace client {

/// What a push brought. `center` is the flat buffer to go on from, whatever the outcome.
struct PushResult {
  v1::PushOutcome outcome;
  std::string center;
};

/// One worker and its server. Every call throws Failure, after its second attempts. Not for several threads, but for
/// LeaveNow.
class Worker {
 public:
  /// `address`: HOST:PORT or unix:PATH. The first call connects.
  Worker(const std::string& address, std::string worker_id, bool is_chief = false);

  /// For the chief: sets the center, once. Returns whether it was this call that did; if not, pull.
  v1::InitializeResponse Initialize(std::uint64_t global_step, const v1::Manifest& manifest,
                                    const std::vector<std::string>& variables);

  /// Returns the flat buffer of the center, to train from it; what is trained from it has its step as base step. `wait`: for the chief.
  std::string Pull(bool wait);

  /// One round, with the whole flat buffer.
  PushResult PushAndAverage(std::string_view flat);

  v1::GetStatusResponse GetStatus();

  /// Says goodbye.
  void Leave();

  /// Says that this worker has finished its training: no round waits for it any longer.
  void Finish();

  /// Says goodbye, once and within 5 s; what goes wrong is of no interest any more. Any thread may do it.
  void LeaveNow() noexcept;

  const std::string& worker_id() const { return worker_id_; }
  bool is_chief() const { return is_chief_; }
  /// Of the last pull, or of the initialization by this worker.
  const v1::Manifest& manifest() const { return manifest_; }
  const Layout& layout() const { return layout_; }
  /// The base step of the next push.
  std::uint64_t global_step() const { return global_step_; }

 private:
  v1::LeaveRequest Goodbye() const;

  Calls calls_;
  const std::string worker_id_;
  const bool is_chief_;
  /// 16 random bytes: tells this process from an earlier one of the same worker.
  const std::string incarnation_;
  std::uint64_t last_push_id_ = 0;

  v1::Manifest manifest_;
  Layout layout_;
  /// Empty until this worker knows the center.
  std::string manifest_id_;
  std::uint64_t global_step_ = 0;
};

}  // namespace client
