#include "worker.h"

#include <chrono>
#include <iostream>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "failure.h"

namespace client {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono_literals::operator""s;

/// How long a server may be away, or take to notice that a former process of this worker is gone.
constexpr auto kPatience = 20s;
constexpr auto kConnectTimeout = 1s;
constexpr auto kLeaveTimeout = 5s;
/// The server answers when a checkpoint has it.
constexpr auto kFinishTimeout = 60s;

std::string RandomBytes(std::size_t size) {
  std::random_device device;
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(device());
  return bytes;
}

/// A pause before attempt `attempt`: up to a second, with chance in it, so that workers do not come back all at once.
void Pause(int attempt) {
  thread_local std::minstd_rand random{std::random_device{}()};
  const double longest_s = attempt < 4 ? 0.1 * (1 << attempt) : 1.0;
  std::uniform_real_distribution pause_s(longest_s / 2, longest_s);
  std::this_thread::sleep_for(std::chrono::duration<double>(pause_s(random)));
}

/// Makes a call as often as its failures ask for it: "again" at once, "later" for `kPatience`.
template <typename Call>
auto Persist(Calls& calls, Call call) {
  std::optional<Clock::time_point> give_up;
  for (int attempt = 0;; ++attempt) {
    const auto started = Clock::now();
    try {
      return call();
    } catch (const Failure& failure) {
      if (failure.action() == "again") continue;
      if (failure.action() != "later") throw;
      // An attempt that lasted, at the barrier for instance, had found the server again: its end is a new failure.
      const auto now = Clock::now();
      if (!give_up || now - started > kPatience) {
        give_up = now + kPatience;
        attempt = 0;
        std::cerr << std::string("trying again for 20 s: ") + failure.what() + "\n";
      }
      if (now >= *give_up) throw;
      Pause(attempt);
      calls.AwaitConnection(kConnectTimeout);
    }
  }
}

}  // namespace

Worker::Worker(const std::string& address, std::string worker_id, bool is_chief)
    : calls_(address),
      worker_id_(std::move(worker_id)),
      is_chief_(is_chief),
      incarnation_(RandomBytes(16)) {}

v1::InitializeResponse Worker::Initialize(std::uint64_t global_step, const v1::Manifest& manifest,
                                          const std::vector<std::string>& variables) {
  v1::InitializeHeader header;
  header.set_worker_id(worker_id_);
  header.set_global_step(global_step);
  *header.mutable_manifest() = manifest;
  std::optional<Layout> layout;
  try {
    layout.emplace(manifest);
  } catch (const Failure&) {
    // The server names the rule that the manifest breaks.
  }
  const std::string flat = layout ? layout->Flat(variables) : "";
  const auto response = Persist(calls_, [&] { return calls_.Initialize(header, layout ? &*layout : nullptr, flat); });
  if (response.initialized() && layout) {
    manifest_ = manifest;
    layout_ = *layout;
    manifest_id_ = response.manifest_id();
    global_step_ = response.global_step();
  }
  return response;
}

std::string Worker::Pull(bool wait) {
  v1::PullRequest request;
  request.set_worker_id(worker_id_);
  request.set_wait_initialized(wait);
  request.set_will_train(true);
  Center center = Persist(calls_, [&] { return calls_.Pull(request); });
  manifest_ = std::move(*center.header.mutable_manifest());
  layout_ = std::move(center.layout);
  manifest_id_ = center.header.manifest_id();
  global_step_ = center.header.global_step();
  return std::move(center.flat);
}

PushResult Worker::PushAndAverage(std::string_view flat) {
  if (flat.size() != layout_.size_bytes()) throw Refusal("a push that does not have the size of the model");
  v1::PushHeader header;
  header.set_worker_id(worker_id_);
  header.set_incarnation(incarnation_);
  header.set_push_id(++last_push_id_);
  header.set_is_chief(is_chief_);
  header.set_base_step(global_step_);
  header.set_manifest_id(manifest_id_);
  header.set_half_duplex(true);
  PushResult result;
  result.outcome = Persist(calls_, [&] { return calls_.PushAndAverage(header, layout_, flat, result.center); });
  global_step_ = result.outcome.global_step();
  return result;
}

v1::GetStatusResponse Worker::GetStatus() {
  return Persist(calls_, [&] { return calls_.GetStatus(); });
}

void Worker::Leave() {
  Persist(calls_, [&] { calls_.Leave(Goodbye(), kLeaveTimeout); });
}

void Worker::Finish() {
  v1::LeaveRequest request = Goodbye();
  request.set_finished(true);
  Persist(calls_, [&] { calls_.Leave(request, kFinishTimeout); });
}

void Worker::LeaveNow() noexcept {
  try {
    calls_.Leave(Goodbye(), kLeaveTimeout);
  } catch (const std::exception&) {
  }
}

v1::LeaveRequest Worker::Goodbye() const {
  v1::LeaveRequest request;
  request.set_worker_id(worker_id_);
  request.set_incarnation(incarnation_);
  return request;
}

}  // namespace client
