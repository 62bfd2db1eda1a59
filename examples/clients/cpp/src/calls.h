// The five calls of the protocol, each made once: no state, no second attempt. Every call throws Failure.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>

#include "layout.h"

namespace grpc {
class Channel;
}

namespace client {

/// A center as it was pulled.
struct Center {
  v1::CenterHeader header;
  Layout layout;
  std::string flat;
};

class Calls {
 public:
  explicit Calls(const std::string& address);

  /// Waits for a connection, but no longer than this. gRPC's synchronous API connects only while a thread waits in it:
  /// who just sleeps between two attempts finds a server that is back up to 5 s late.
  void AwaitConnection(std::chrono::milliseconds timeout);

  /// Without a layout only the header is sent: the manifest breaks a rule, and the server says which.
  v1::InitializeResponse Initialize(const v1::InitializeHeader& header, const Layout* layout, std::string_view flat);

  Center Pull(const v1::PullRequest& request);

  /// Half-duplex, which the header has to say: writes all of `flat`, half-closes, and reads the new center into `center`,
  /// which means nothing unless the call returns.
  v1::PushOutcome PushAndAverage(const v1::PushHeader& header, const Layout& layout, std::string_view flat,
                                 std::string& center);

  v1::GetStatusResponse GetStatus();

  void Leave(const v1::LeaveRequest& request, std::chrono::seconds timeout);

 private:
  std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace client
