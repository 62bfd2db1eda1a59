#include "calls.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <iostream>
#include <optional>
#include <thread>
#include <utility>

#include "failure.h"
#include "modelaverage/v1/parameter_server.grpc.pb.h"

namespace client {
namespace {

std::string StatusName(grpc::StatusCode code) {
  static constexpr std::array kNames = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const auto index = static_cast<std::size_t>(code);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

/// The server's reason without its prefix, if there is one that this client knows.
std::string Reason(const grpc::ClientContext& context) {
  const auto& trailing = context.GetServerTrailingMetadata();
  const auto found = trailing.find("modelaverage-reason");
  if (found == trailing.end()) return "";
  const std::string reason(found->second.data(), found->second.size());
  v1::ErrorReason known;
  if (!v1::ErrorReason_Parse(reason, &known)) return "";
  return reason.substr(std::string_view("ERROR_REASON_").size());
}

void ThrowUnlessOk(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return;
  const std::string reason = Reason(context);
  std::string message = status.error_message();
  std::ranges::replace_if(message, [](unsigned char letter) { return std::iscntrl(letter); }, ' ');
  const auto says = [&message](const char* words) { return message.find(words) != std::string::npos; };
  const grpc::StatusCode code = status.error_code();
  // gRPC's ways to say that the connection broke under a stream.
  const bool broken = code == grpc::UNAVAILABLE || (code == grpc::INTERNAL && says("RST_STREAM")) ||
                      (code == grpc::UNKNOWN && says("Stream removed"));
  throw Failure(reason.empty() ? StatusName(code) : reason, message,
                broken && (reason.empty() || code == grpc::UNAVAILABLE));
}

/// Writes fragments from `first` on, then the half-close. A write fails only when the call is over: its status tells
/// why.
template <typename Request>
void SendFragments(auto& stream, const Layout& layout, std::string_view flat, std::uint32_t first) {
  Request request;
  for (std::uint32_t index = first; index < layout.num_fragments(); ++index) {
    const Range range = layout.fragment(index);
    request.mutable_fragment()->set_index(index);
    request.mutable_fragment()->set_data(flat.data() + range.offset, range.size);
    if (!stream.Write(request)) return;
  }
  stream.WritesDone();
}

/// A flat buffer that comes in fragments.
class Arrival {
 public:
  Arrival(const Layout& layout, std::string& flat) : layout_(layout), flat_(flat) {
    flat_.assign(layout.size_bytes(), '\0');
  }

  void Take(const v1::Fragment& fragment) {
    if (fragment.index() != next_ || next_ >= layout_.num_fragments()) {
      throw Refusal("fragment " + std::to_string(fragment.index()) + " came instead of " + Next());
    }
    const Range range = layout_.fragment(next_);
    if (fragment.data().size() != range.size) {
      throw Refusal(Next() + " has " + std::to_string(fragment.data().size()) + " bytes instead of " +
                    std::to_string(range.size));
    }
    std::ranges::copy(fragment.data(), flat_.begin() + static_cast<std::ptrdiff_t>(range.offset));
    ++next_;
  }

  void RequireWhole() const {
    if (next_ < layout_.num_fragments()) throw Refusal(Next() + " is missing");
  }

 private:
  std::string Next() const {
    return "fragment " + std::to_string(next_) + " of " + std::to_string(layout_.num_fragments());
  }

  const Layout& layout_;
  std::string& flat_;
  std::uint32_t next_ = 0;
};

/// A name as text: whatever a terminal would take for a command, or for the end of the line, becomes a question mark.
std::string Shown(std::string name) {
  for (char& byte : name) {
    if (static_cast<unsigned char>(byte) < 0x20 || static_cast<unsigned char>(byte) > 0x7e) byte = '?';
  }
  return name;
}

void Log(const v1::WaitingNotice& notice) {
  std::string line = "waiting for";
  for (const std::string& name : notice.waiting_for()) line += " " + Shown(name);
  if (notice.waiting_for_omitted() > 0) line += " and " + std::to_string(notice.waiting_for_omitted()) + " more";
  if (notice.waiting_for_unknown() > 0) line += " " + std::to_string(notice.waiting_for_unknown()) + " unknown";
  std::cerr << line + "\n";
}

/// What comes down in a push, message by message. Fields that are not known are ignored, empty messages, too.
class PushAnswer {
 public:
  PushAnswer(const Layout& layout, std::string& center)
      : num_fragments_(layout.num_fragments()), arrival_(layout, center) {}

  /// Returns where to start sending, when the message has the admission.
  std::optional<std::uint32_t> Take(const v1::PushAndAverageResponse& response) {
    std::optional<std::uint32_t> first_needed;
    if (response.has_waiting()) Log(response.waiting());
    if (response.has_admission()) {
      first_needed = response.admission().first_needed_fragment();
      if (std::exchange(admitted_, true)) throw Refusal("a second admission came");
      if (*first_needed > num_fragments_) throw Refusal("a fragment that does not exist is needed");
    }
    if (response.has_shared()) throw Refusal("shared memory came unasked");
    if (response.has_fragment() || response.has_outcome()) {
      if (!admitted_) throw Refusal("an answer came before the admission");
      if (outcome_) throw Refusal("something came after the outcome");
    }
    if (response.has_fragment()) arrival_.Take(response.fragment());
    if (response.has_outcome()) outcome_ = response.outcome();
    return first_needed;
  }

  v1::PushOutcome Outcome() const {
    if (!outcome_) throw Refusal("the stream ended without an outcome");
    arrival_.RequireWhole();
    if (outcome_->outcome() < v1::OUTCOME_COMMITTED || outcome_->outcome() > v1::OUTCOME_ALREADY_COUNTED) {
      throw Refusal("unknown outcome " + std::to_string(outcome_->outcome()));
    }
    return *outcome_;
  }

 private:
  std::uint32_t num_fragments_;
  Arrival arrival_;
  bool admitted_ = false;
  std::optional<v1::PushOutcome> outcome_;
};

}  // namespace

Calls::Calls(const std::string& address) {
  grpc::ChannelArguments arguments;
  // A server that is gone without a word is noticed; one that is started again is found within a second.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000);  // how long a connection may take
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  channel_ = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

void Calls::AwaitConnection(std::chrono::milliseconds timeout) {
  channel_->WaitForConnected(std::chrono::system_clock::now() + timeout);
}

v1::InitializeResponse Calls::Initialize(const v1::InitializeHeader& header, const Layout* layout,
                                         std::string_view flat) {
  grpc::ClientContext context;
  v1::InitializeResponse response;
  const auto stub = v1::ParameterServer::NewStub(channel_);
  const auto stream = stub->Initialize(&context, &response);
  v1::InitializeRequest opening;
  *opening.mutable_header() = header;
  stream->Write(opening);
  if (layout != nullptr) {
    SendFragments<v1::InitializeRequest>(*stream, *layout, flat, 0);
  } else {
    stream->WritesDone();
  }
  ThrowUnlessOk(stream->Finish(), context);
  return response;
}

Center Calls::Pull(const v1::PullRequest& request) {
  grpc::ClientContext context;
  const auto stub = v1::ParameterServer::NewStub(channel_);
  const auto stream = stub->Pull(&context, request);
  Center center;
  std::optional<Arrival> arrival;
  std::optional<Failure> refused;
  v1::PullResponse response;
  while (!refused && stream->Read(&response)) {
    try {
      if (response.has_header()) {
        if (arrival) throw Refusal("a second header came");
        center.header = response.header();
        center.layout = Layout(center.header.manifest());
        arrival.emplace(center.layout, center.flat);
      } else if (response.has_fragment()) {
        if (!arrival) throw Refusal("a fragment came before the header");
        arrival->Take(response.fragment());
      }
    } catch (const Failure& failure) {
      refused = failure;
      context.TryCancel();
    }
  }
  const grpc::Status status = stream->Finish();
  if (refused) throw *refused;
  ThrowUnlessOk(status, context);
  if (!arrival) throw Refusal("the stream ended without a header");
  arrival->RequireWhole();
  return center;
}

v1::PushOutcome Calls::PushAndAverage(const v1::PushHeader& header, const Layout& layout, std::string_view flat,
                                      std::string& center) {
  grpc::ClientContext context;
  const auto stub = v1::ParameterServer::NewStub(channel_);
  const auto stream = stub->PushAndAverage(&context);
  v1::PushAndAverageRequest opening;
  *opening.mutable_header() = header;
  stream->Write(opening);

  // The average comes down while fragments go up: this thread reads, another one writes. It never outlives the call,
  // because a write to a call that is over fails.
  std::thread sender;
  PushAnswer answer(layout, center);
  std::optional<Failure> refused;
  v1::PushAndAverageResponse response;
  while (!refused && stream->Read(&response)) {
    try {
      if (const auto first_needed = answer.Take(response)) {
        sender = std::thread([&stream, &layout, flat, first = *first_needed] {
          SendFragments<v1::PushAndAverageRequest>(*stream, layout, flat, first);
        });
      }
    } catch (const Failure& failure) {
      refused = failure;
      context.TryCancel();
    }
  }
  if (sender.joinable()) sender.join();
  const grpc::Status status = stream->Finish();
  if (refused) throw *refused;
  ThrowUnlessOk(status, context);
  return answer.Outcome();
}

v1::GetStatusResponse Calls::GetStatus() {
  grpc::ClientContext context;
  v1::GetStatusResponse response;
  ThrowUnlessOk(v1::ParameterServer::NewStub(channel_)->GetStatus(&context, {}, &response), context);
  return response;
}

void Calls::Leave(const v1::LeaveRequest& request, std::chrono::seconds timeout) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  v1::LeaveResponse response;
  ThrowUnlessOk(v1::ParameterServer::NewStub(channel_)->Leave(&context, request, &response), context);
}

}  // namespace client
