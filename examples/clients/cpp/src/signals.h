// Ctrl-C and SIGTERM.
#pragma once

#include <atomic>
#include <thread>

#include "worker.h"

namespace client {

/// While it lives, Ctrl-C and SIGTERM make the worker say goodbye and end the process, whatever its call waits for.
class SignalGuard {
 public:
  /// To be called before any thread is started, gRPC's included.
  static void BlockSignals();

  explicit SignalGuard(Worker& worker);
  /// Does not return if the process is being ended.
  ~SignalGuard();

 private:
  void Watch(Worker& worker);

  std::atomic<bool> over_ = false;
  std::thread thread_;
};

}  // namespace client
