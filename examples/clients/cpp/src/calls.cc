#include "calls.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <iostream>
#include <optional>

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

/// A value of the trailing metadata; empty if it is not there.
std::string Trailer(const grpc::ClientContext& context, const char* key) {
  const auto& trailing = context.GetServerTrailingMetadata();
  const auto found = trailing.find(key);
  return found == trailing.end() ? "" : std::string(found->second.data(), found->second.size());
}

void ThrowUnlessOk(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return;
  std::string message = status.error_message();
  std::ranges::replace_if(message, [](unsigned char letter) { return std::iscntrl(letter); }, ' ');
  const auto says = [&message](const char* words) { return message.find(words) != std::string::npos; };
  const grpc::StatusCode code = status.error_code();
  const std::string action = Trailer(context, "modelaverage-action");
  // gRPC's ways to say that the connection broke under a stream.
  if (action.empty() && (code == grpc::UNAVAILABLE || (code == grpc::INTERNAL && says("RST_STREAM")) ||
                         (code == grpc::UNKNOWN && says("Stream removed")))) {
    throw Failure("UNAVAILABLE", message, "later");
  }
  const std::string reason = Trailer(context, "modelaverage-reason");
  v1::ErrorReason known;
  const bool is_known = v1::ErrorReason_Parse(reason, &known);
  throw Failure(is_known ? reason.substr(std::string_view("ERROR_REASON_").size()) : StatusName(code), message, action);
}

/// Writes the opening, all fragments, and the half-close. A write fails only when the call is over: its status tells why.
template <typename Request>
void WriteAll(auto& stream, const Request& opening, const Layout* layout, std::string_view flat) {
  if (!stream.Write(opening)) return;
  Request request;
  for (std::uint32_t index = 0; layout != nullptr && index < layout->num_fragments(); ++index) {
    const Range range = layout->fragment(index);
    request.mutable_fragment()->set_index(index);
    request.mutable_fragment()->set_data(flat.data() + range.offset, range.size);
    if (!stream.Write(request)) return;
  }
  stream.WritesDone();
}

/// Gives every message to `take` until the stream ends. If `take` throws Failure, the call ends with it.
template <typename Response>
void ReadAll(auto& stream, grpc::ClientContext& context, auto take) {
  std::optional<Failure> refused;
  Response response;
  while (!refused && stream.Read(&response)) {
    try {
      take(response);
    } catch (const Failure& failure) {
      refused = failure;
      context.TryCancel();
    }
  }
  const grpc::Status status = stream.Finish();
  if (refused) throw *refused;
  ThrowUnlessOk(status, context);
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
  WriteAll(*stream, opening, layout, flat);
  ThrowUnlessOk(stream->Finish(), context);
  return response;
}

Center Calls::Pull(const v1::PullRequest& request) {
  grpc::ClientContext context;
  const auto stub = v1::ParameterServer::NewStub(channel_);
  const auto stream = stub->Pull(&context, request);
  Center center;
  std::optional<Arrival> arrival;
  ReadAll<v1::PullResponse>(*stream, context, [&](const v1::PullResponse& response) {
    if (response.has_header()) {
      if (arrival) throw Refusal("a second header came");
      center.header = response.header();
      center.layout = Layout(center.header.manifest());
      arrival.emplace(center.layout, center.flat);
    } else if (response.has_fragment()) {
      if (!arrival) throw Refusal("a fragment came before the header");
      arrival->Take(response.fragment());
    }
  });
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
  WriteAll(*stream, opening, &layout, flat);

  Arrival arrival(layout, center);
  std::optional<v1::PushOutcome> outcome;
  ReadAll<v1::PushAndAverageResponse>(*stream, context, [&](const v1::PushAndAverageResponse& response) {
    if (outcome) throw Refusal("something came after the outcome");
    if (response.has_waiting()) Log(response.waiting());
    if (response.has_fragment()) arrival.Take(response.fragment());
    if (response.has_outcome()) outcome = response.outcome();
  });
  if (!outcome) throw Refusal("the stream ended without an outcome");
  arrival.RequireWhole();
  if (outcome->outcome() < v1::OUTCOME_COMMITTED || outcome->outcome() > v1::OUTCOME_ALREADY_COUNTED) {
    throw Refusal("unknown outcome " + std::to_string(outcome->outcome()));
  }
  return *outcome;
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
