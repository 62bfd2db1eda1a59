#include "signals.h"

#include <csignal>
#include <unistd.h>

namespace client {
namespace {

sigset_t EndingSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  return signals;
}

}  // namespace

void SignalGuard::BlockSignals() {
  const sigset_t signals = EndingSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

SignalGuard::SignalGuard(Worker& worker) : thread_([this, &worker] { Watch(worker); }) {}

SignalGuard::~SignalGuard() {
  over_ = true;
  pthread_kill(thread_.native_handle(), SIGTERM);
  thread_.join();
}

void SignalGuard::Watch(Worker& worker) {
  const sigset_t signals = EndingSignals();
  int signal = 0;
  sigwait(&signals, &signal);
  if (over_) return;
  worker.LeaveNow();
  // Not exit(): another thread may be anywhere in a call.
  _exit(128 + signal);
}

}  // namespace client
