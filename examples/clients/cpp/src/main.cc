// The command line. The protocol is in calls.cc and worker.cc.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <csignal>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "commands.h"
#include "failure.h"
#include "worker.h"

namespace {

using client::TrainOptions;
using client::Worker;

constexpr std::string_view kUsage =
    "usage: client train --server ADDRESS --worker-id ID --data CSV --part I/N --rounds R [--chief]\n"
    "       client conform ADDRESS WORKER_ID\n";

struct UsageError {};

/// While it lives, Ctrl-C and SIGTERM make the worker say goodbye and end the process, whatever its call waits for.
class SignalGuard {
 public:
  /// To be called before there is any other thread: they inherit it.
  static void BlockSignals() {
    const sigset_t signals = EndingSignals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  }

  explicit SignalGuard(Worker& worker) : thread_([this, &worker] { Watch(worker); }) {}

  /// Does not return if the process is being ended.
  ~SignalGuard() {
    over_ = true;
    pthread_kill(thread_.native_handle(), SIGTERM);
    thread_.join();
  }

 private:
  static sigset_t EndingSignals() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    return signals;
  }

  void Watch(Worker& worker) const {
    const sigset_t signals = EndingSignals();
    int signal = 0;
    sigwait(&signals, &signal);
    if (over_) return;
    worker.LeaveNow();
    // Not exit(): the other thread may be anywhere in a call.
    _exit(128 + signal);
  }

  std::atomic<bool> over_ = false;
  std::thread thread_;
};

std::uint64_t ParseNumber(std::string_view text) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) throw UsageError();
  return number;
}

int RunTrain(int argc, char** argv) {
  std::map<std::string_view, std::string> flags = {
      {"--server", ""}, {"--worker-id", ""}, {"--data", ""}, {"--part", ""}, {"--rounds", ""}};
  bool is_chief = false;
  for (int i = 2; i < argc; ++i) {
    if (argv[i] == std::string_view("--chief")) {
      is_chief = true;
    } else if (const auto flag = flags.find(argv[i]); flag != flags.end() && i + 1 < argc) {
      flag->second = argv[++i];
    } else {
      throw UsageError();
    }
  }
  if (std::ranges::any_of(flags, [](const auto& flag) { return flag.second.empty(); })) throw UsageError();
  const std::string_view part = flags["--part"];
  const std::size_t slash = std::min(part.find('/'), part.size() - 1);
  const TrainOptions options{.data = flags["--data"],
                             .part = ParseNumber(part.substr(0, slash)),
                             .num_parts = ParseNumber(part.substr(slash + 1)),
                             .rounds = ParseNumber(flags["--rounds"])};
  if (options.part >= options.num_parts) throw UsageError();
  Worker worker{flags["--server"], flags["--worker-id"], is_chief};
  const SignalGuard guard(worker);
  std::cout << client::Train(worker, options) << std::endl;
  return 0;
}

int Run(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (std::any_of(argv + 1, argv + argc, [](const char* word) { return word == std::string_view("--help"); })) {
    std::cout << kUsage;
    return 0;
  }
  if (command == "train") return RunTrain(argc, argv);
  if (command != "conform" || argc != 4) throw UsageError();
  Worker worker(argv[2], argv[3]);
  const SignalGuard guard(worker);
  client::Conform(worker, std::cin, std::cout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  SignalGuard::BlockSignals();
  try {
    return Run(argc, argv);
  } catch (const UsageError&) {
    std::cerr << kUsage;
    return 2;
  } catch (const client::Failure& failure) {
    std::cerr << "client: " + failure.name() + ": " + failure.what() + "\n";
  } catch (const std::exception& error) {
    std::cerr << std::string("client: ") + error.what() + "\n";
  }
  return 1;
}
