"""The command `ps-server`: the only place that reads its flags."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import shutil
import sys
from functools import partial
from itertools import zip_longest
from pathlib import Path

# gRPC's own log prints a page of C++ for a port in use. Must be set before gRPC is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from modelaverage import __version__
from modelaverage.access.channels import Access
from modelaverage.addresses import check_all
from modelaverage.commands import flag_types
from modelaverage.commands.security_flags import add_security_flags, security_of
from modelaverage.commands.serve_flags import ServeFlags, add_serve_flags
from modelaverage.commands.slow import says_if_slow
from modelaverage.errors import SecurityError
from modelaverage.logs import event, keep_logging, log_json, say
from modelaverage.runtime.output import CLOSED_PIPE_EXIT_CODE, OnLoss, OutputLostError
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.console import status
from ps_server.console.export import ExportError, export
from ps_server.console.watch import watch
from ps_server.edge.security import ServerSecurity, add_server_security_flags
from ps_server.flow.service import DEFAULT_SHARED_MEMORY_FROM_BYTES, ServicePolicy
from ps_server.machine.descriptors import raise_limit
from ps_server.machine.memory_limit import default_max_model_bytes
from ps_server.rules.policy import MAX_WORKERS, RoundPolicy
from ps_server.server import ServerConfig, UnusableSettingError, serve, stop_on_signals

__all__ = ["main"]

_log = logging.getLogger("ps_server")

_SERVE_EXAMPLES = """\
examples:
  ps-server serve --num-workers 2                       on loopback, for workers on this machine
  ps-server serve --bind 0.0.0.0:2222 --num-workers 8 --tls-cert ps.pem --tls-key ps.key --token-file token   anywhere
  ps-server serve --bind 0.0.0.0:2222 --num-workers 8 --insecure   on a network that you trust: no encryption
  ps-server serve --bind unix:/tmp/ps.sock --bind 127.0.0.1:2222 --num-workers 4   both: a socket is faster on one host
  ps-server serve --num-workers 4 --checkpoint-dir center/   after a kill or a stop, continues from there
  ps-server serve --num-workers 8 --min-workers 6 --grace-s 10   continues without workers that are 10 s late
  ps-server serve --bind 127.0.0.1:0 --num-workers 2 --ready-file ready.json   on a free port, for scripts
"""
_STATUS_EXAMPLES = """\
examples:
  ps-server status 127.0.0.1:2222
  ps-server status 127.0.0.1:2222 --json | jq .waiting_for
  ps-server status ps0:2222 ps1:2222                   a job with two servers
  ps-server status ps0:2222 ps1:2222 --watch           a live view of both
  ps-server status 127.0.0.1:2222 --watch 10 --json    a line of JSON every 10 s
"""
_EXPORT_EXAMPLES = """\
examples:
  ps-server export center/ model.safetensors           the newest usable checkpoint; a server may be using the directory
  ps-server export center/ model.safetensors --with-outer-state   with the momentum and the like of its outer optimizer
  ps-server export 127.0.0.1:2222 model.safetensors    a server's current center
  ps-server export ps0:2222 ps1:2222 model.safetensors   the whole model of a job with two servers, in their order
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    keep_logging("ps-server")
    arguments = _parser().parse_args(_spelled_out(sys.argv[1:] if argv is None else argv))
    keep_logging("ps-server", arguments.on_loss)
    try:
        exit_code = int(arguments.run(arguments))
        sys.stdout.flush()
        return exit_code
    except OutputLostError as error:
        if error.is_closed_pipe:
            return CLOSED_PIPE_EXIT_CODE
        print(f"ps-server: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return 1
    except (SecurityError, UnusableSettingError) as error:
        if getattr(arguments, "log_json", False):
            _log.error("%s", error, extra=event("failed", cause=str(error)))
        else:
            print(f"ps-server: {error}", file=sys.stderr)
        return 1


def _spelled_out(argv: list[str]) -> list[str]:
    """Rewrites `status --watch ADDRESS`, so that the address is not parsed as the interval."""
    return [
        "--watch=1" if word == "--watch" and not _is_number(after) else word
        for word, after in zip_longest(argv, argv[1:], fillvalue="")
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ps-server", description="The model-averaging parameter server.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "serve",
        help="keep the center variables and average the workers' pushes",
        description="Keeps the center variables and averages the workers' pushes, until SIGTERM, SIGHUP or Ctrl-C.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--bind",
        action="append",
        metavar="ADDRESS",
        help="where to listen: HOST:PORT (port 0: any free one) or unix:PATH; may be repeated (127.0.0.1:2222)",
    )
    command.add_argument(
        "--num-workers",
        type=flag_types.count,
        required=True,
        metavar="N",
        help="how many workers every round waits for",
    )
    add_serve_flags(command)
    command.add_argument(
        "--ready-file",
        type=Path,
        metavar="FILE",
        help='once listening, write {"address": ..., "pid": ..., "data_port": ...} to this file',
    )
    command.add_argument(
        "--stream-idle-timeout-s",
        type=flag_types.seconds,
        default=120.0,
        metavar="SECONDS",
        help="drop a stream whose client neither sends nor reads for this long; waiting at the barrier does not count. "
        "A link must carry a fragment (1 MiB) in that time (%(default)s)",
    )
    command.add_argument(
        "--max-model-bytes",
        type=flag_types.count,
        default=default_max_model_bytes(),
        metavar="BYTES",
        help="refuse a model that needs more than twice this much memory; the server holds 16-bit variables four "
        "times, others and an outer optimizer's state twice (a third of this machine's memory, or of the cgroup's "
        "limit)",
    )
    command.add_argument(
        "--no-shared-memory", action="store_true", help="have workers on this host send their bytes as all others do"
    )
    command.add_argument(
        "--data-port",
        type=_data_port,
        default=0,
        metavar="PORT",
        help="port of a second connection for the bytes of large models, on every host of --bind; 0: "
        "any free one; off: none, as with TLS. A worker that cannot reach it sends bytes in messages (%(default)s)",
    )
    command.add_argument(
        "--metrics-bind",
        metavar="ADDRESS",
        help="serve metrics for Prometheus at http://ADDRESS/metrics, HOST:PORT (port 0: any free one). They are not "
        "encrypted and not authenticated: on any address but loopback, anyone can read them (nowhere)",
    )
    command.add_argument("--verbose", action="store_true", help="log refused calls and every round")
    add_server_security_flags(command)
    command.add_argument(
        "--log-json", action="store_true", help="every line is a JSON object; docs/observability.md has the fields"
    )
    command.set_defaults(run=_serve, on_loss=OnLoss.GO_ON)

    command = commands.add_parser(
        "status",
        help="show what servers are doing and which workers they wait for",
        description="Shows phase, global_step, the workers that the round waits for, and every worker, by server.",
        epilog=_STATUS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "addresses",
        nargs="+",
        metavar="ADDRESS",
        help="HOST:PORT or unix:PATH of a server; one or more",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="the whole status as JSON, times in s, sizes in bytes; a list if there are several servers; with --watch "
        "one object a line",
    )
    command.add_argument(
        "--timeout-s",
        type=flag_types.seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for an answer (%(default)s)",
    )
    add_security_flags(command)
    command.add_argument(
        "--watch",
        type=flag_types.seconds,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="refresh at this interval (1) until Ctrl-C: a live view in a terminal, otherwise a line for each change",
    )
    command.set_defaults(run=_status, on_loss=OnLoss.END)

    command = commands.add_parser(
        "export",
        help="write the center variables to a safetensors file",
        description="Writes the center variables as they are to a safetensors file, for torch and anything else that "
        "reads such files; the file's metadata has the global_step.",
        epilog=_EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a --checkpoint-dir, or HOST:PORT or unix:PATH of a server; for a job with several servers, all of them, "
        "in order",
    )
    command.add_argument(
        "out", type=Path, metavar="OUT.safetensors", help="the file; an existing one is replaced at the end"
    )
    command.add_argument(
        "--timeout-s",
        type=flag_types.seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for a server to start sending (%(default)s)",
    )
    command.add_argument(
        "--with-outer-state",
        action="store_true",
        help="also write the outer optimizer's state, as tensors named outer/SLOT/VARIABLE, and its settings to the "
        "metadata; only from a --checkpoint-dir",
    )
    add_security_flags(command)
    command.set_defaults(run=_export, on_loss=OnLoss.DROP)  # the command's result is the file
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.log_json:
        log_json("ps-server")
    else:
        logging.basicConfig(format="%(asctime)s ps-server: %(message)s")
    logging.getLogger("ps_server").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    raise_limit()
    config = ServerConfig(
        binds=tuple(arguments.bind or ["127.0.0.1:2222"]),
        policy=ServicePolicy(
            round=_round_policy(arguments),
            max_model_bytes=arguments.max_model_bytes,
            stall_timeout_s=arguments.stream_idle_timeout_s,
            shared_memory_from_bytes=math.inf if arguments.no_shared_memory else DEFAULT_SHARED_MEMORY_FROM_BYTES,
            checkpoints=None
            if arguments.checkpoint_dir is None
            else CheckpointPolicy(
                arguments.checkpoint_dir,
                arguments.checkpoint_every_rounds or 1,
                timeout_s=arguments.checkpoint_timeout_s,
            ),
        ),
        ready_file=arguments.ready_file,
        security=_server_security(arguments),
        metrics_bind=arguments.metrics_bind,
        data_port=arguments.data_port,
    )

    tell = partial(say, "ps-server", arguments.log_json)

    async def run() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await serve(
            config,
            stop,
            ready=lambda at: tell(f"listening on {', '.join(at)}", event("listening", addresses=at)),
            metrics_ready=lambda at: tell(f"metrics at http://{at}/metrics", event("metrics_listening", address=at)),
            data_port_ready=lambda at: tell(
                f"data connections at {', '.join(at)}", event("data_port_listening", addresses=at)
            ),
        )

    asyncio.run(run())
    return 0


def _server_security(arguments: argparse.Namespace) -> ServerSecurity:
    return ServerSecurity(
        arguments.tls_cert,
        arguments.tls_key,
        arguments.tls_client_ca,
        arguments.token_file,
        arguments.chief_token_file,
        arguments.reader_token_file,
        arguments.insecure,
    )


def _round_policy(arguments: argparse.Namespace) -> RoundPolicy:
    """Raises UnusableSettingError unless the numbers of workers fit together."""
    num_workers: int = arguments.num_workers
    told = ServeFlags.from_arguments(arguments)
    try:
        told.check_workers(num_workers)
    except ValueError as error:
        raise UnusableSettingError(str(error)) from None
    max_workers = told.max_workers or num_workers
    if max_workers > MAX_WORKERS:
        flag = "--num-workers" if num_workers > MAX_WORKERS else "--max-workers"
        raise UnusableSettingError(f"{flag} {max_workers} is more than a round may have; at most {MAX_WORKERS} fit")
    grace_s = told.grace_s if isinstance(told.grace_s, float) else None
    return RoundPolicy(num_workers, told.min_workers or num_workers, max_workers, grace_s, told.round_timeout_s)


def _status(arguments: argparse.Namespace) -> int:
    try:
        check_all(arguments.addresses)
    except ValueError as error:
        raise UnusableSettingError(str(error)) from None
    fetch = partial(status.fetch, timeout_s=arguments.timeout_s, access=Access(security_of(arguments)))
    if arguments.watch is not None:
        # One unreachable server must not keep the others from being shown.
        timeout_s = min(arguments.timeout_s, max(1.0, arguments.watch))
        watch(arguments.addresses, partial(fetch, timeout_s=timeout_s), arguments.watch, arguments.json)
        return 0
    seen = list[status.Seen]()
    for address in arguments.addresses:
        try:
            seen.append(status.Seen(address, fetch(address)))
        except status.NoAnswerError as error:
            print(f"ps-server: {error}", file=sys.stderr)
    answers = [each.status for each in seen if each.status is not None]
    if arguments.json and answers:
        print(status.as_json(answers))
    elif answers:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for differ in status.differing_choices(seen):
            print(f"{differ}\n")
        print("\n\n".join(status.as_text(answer, columns) for answer in answers))
    return 0 if len(answers) == len(arguments.addresses) else 1


def _export(arguments: argparse.Namespace) -> int:
    def say(line: str) -> None:
        print(f"ps-server: {line}", file=sys.stderr, flush=True)

    try:
        with says_if_slow(say, f"reads the center from {', '.join(arguments.sources)}"):
            global_step = export(
                arguments.sources,
                arguments.out,
                arguments.timeout_s,
                Access(security_of(arguments)),
                tell=say,
                with_outer_state=arguments.with_outer_state,
            )
    except ExportError as error:
        print(f"ps-server: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: the center of global_step {global_step}")
    return 0


def _data_port(text: str) -> int | None:
    if text == "off":
        return None
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is neither a port, 0 to 65535, nor off")
    return value


if __name__ == "__main__":
    sys.exit(main())
