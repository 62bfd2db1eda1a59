// The command line. Start reading at worker.h, then calls.cc.

#include <getopt.h>

#include <charconv>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>

#include "conform.h"
#include "failure.h"
#include "signals.h"
#include "train.h"
#include "worker.h"

namespace {

using client::SignalGuard;
using client::TrainOptions;
using client::Worker;

constexpr std::string_view kUsage =
    "usage: client train --server ADDRESS --worker-id ID --data CSV --part I/N --rounds R [--chief]\n"
    "       client conform ADDRESS WORKER_ID\n";

std::optional<std::uint64_t> ParseNumber(std::string_view text) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// `argv[0]` is the command; nothing if the arguments are wrong.
std::optional<TrainOptions> ParseTrainOptions(int argc, char** argv) {
  constexpr option kOptions[] = {
      {"server", required_argument, nullptr, 's'}, {"worker-id", required_argument, nullptr, 'w'},
      {"data", required_argument, nullptr, 'd'},   {"part", required_argument, nullptr, 'p'},
      {"rounds", required_argument, nullptr, 'r'}, {"chief", no_argument, nullptr, 'c'},
      {nullptr, 0, nullptr, 0}};
  TrainOptions options;
  std::optional<std::uint64_t> part, num_parts, rounds;
  for (int option; (option = getopt_long(argc, argv, "", kOptions, nullptr)) != -1;) {
    const std::string_view value = optarg == nullptr ? "" : optarg;
    switch (option) {
      case 's':
        options.server = value;
        break;
      case 'w':
        options.worker_id = value;
        break;
      case 'd':
        options.data = value;
        break;
      case 'p':
        if (const auto slash = value.find('/'); slash != value.npos) {
          part = ParseNumber(value.substr(0, slash));
          num_parts = ParseNumber(value.substr(slash + 1));
        }
        break;
      case 'r':
        rounds = ParseNumber(value);
        break;
      case 'c':
        options.is_chief = true;
        break;
      default:
        return std::nullopt;
    }
  }
  const bool complete = !options.server.empty() && !options.worker_id.empty() && !options.data.empty() && part && rounds;
  if (!complete || !num_parts || *part >= *num_parts || optind != argc) return std::nullopt;
  options.part = *part;
  options.num_parts = *num_parts;
  options.rounds = *rounds;
  return options;
}

int Usage() {
  std::cerr << kUsage;
  return 2;
}

int Run(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "--help") {
    std::cout << kUsage;
    return 0;
  }
  if (command == "conform" && argc == 4) {
    Worker worker(argv[2], argv[3]);
    const SignalGuard guard(worker);
    client::Conform(worker, std::cin, std::cout);
    return 0;
  }
  if (command == "train") {
    const auto options = ParseTrainOptions(argc - 1, argv + 1);
    if (!options) return Usage();
    Worker worker(options->server, options->worker_id, options->is_chief);
    const SignalGuard guard(worker);
    std::cout << client::Train(worker, *options) << std::endl;
    return 0;
  }
  return Usage();
}

}  // namespace

int main(int argc, char** argv) {
  SignalGuard::BlockSignals();
  try {
    return Run(argc, argv);
  } catch (const client::Failure& failure) {
    std::cerr << "client: " << failure.name() << ": " << failure.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "client: " << error.what() << "\n";
  }
  return 1;
}
