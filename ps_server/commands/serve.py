"""The flags of `ps-server serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelaverage.commands import flag_types
from modelaverage.commands.serve_flags import add_serve_flags
from modelaverage.runtime.output import OnLoss
from ps_server.commands.subparsers import SubParsers
from ps_server.edge.security import add_server_security_flags
from ps_server.machine.memory_limit import default_max_model_bytes

__all__ = ["add_serve"]

_EXAMPLES = """\
examples:
  ps-server serve --num-workers 2                       on loopback, for workers on this machine
  ps-server serve --bind 0.0.0.0:2222 --num-workers 8 --tls-cert ps.pem --tls-key ps.key --token-file token   anywhere
  ps-server serve --bind 0.0.0.0:2222 --num-workers 8 --insecure   on a network that you trust: no encryption
  ps-server serve --bind unix:/tmp/ps.sock --bind 127.0.0.1:2222 --num-workers 4   both: a socket is faster on one host
  ps-server serve --num-workers 4 --checkpoint-dir center/   after a kill or a stop, continues from there
  ps-server serve --num-workers 8 --min-workers 6 --grace-s 10   continues without workers that are 10 s late
  ps-server serve --bind 127.0.0.1:0 --num-workers 2 --ready-file ready.json   on a free port, for scripts
"""


def add_serve(commands: SubParsers) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "serve",
        help="keep the center variables and average the workers' pushes",
        description="Keeps the center variables and averages the workers' pushes, until SIGTERM, SIGHUP or Ctrl-C.",
        epilog=_EXAMPLES,
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
        "any free one; off: none. Encrypted only with --tls-cert, not with a token alone. A worker "
        "that cannot reach it sends bytes in messages (%(default)s)",
    )
    command.add_argument(
        "--metrics-bind",
        metavar="ADDRESS",
        help="serve metrics for Prometheus at http://ADDRESS/metrics, HOST:PORT (port 0: any free one). They are not "
        "encrypted and not authenticated: on any address but loopback, anyone can read them (nowhere)",
    )
    command.add_argument(
        "--page-bind",
        metavar="ADDRESS",
        help="serve a page that shows the life of the run at http://ADDRESS, HOST:PORT (port 0: any free one), https "
        "with --tls-cert; browsers need a token if there is a --token-file (nowhere)",
    )
    command.add_argument(
        "--page-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name under which browsers reach the page; may be repeated",
    )
    command.add_argument(
        "--page-shard",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="HOST:PORT of another server of the job, which the page shows beside this one; may be repeated. It is "
        "asked with this server's certificate and the first token of --reader-token-file, or else --token-file",
    )
    command.add_argument(
        "--page-shard-ca",
        type=Path,
        metavar="FILE",
        help="authorities that sign those servers' certificates, with --tls-cert (the public ones)",
    )
    command.add_argument("--verbose", action="store_true", help="log refused calls and every round")
    add_server_security_flags(command)
    command.add_argument(
        "--log-json", action="store_true", help="every line is a JSON object; docs/observability.md has the fields"
    )
    command.set_defaults(run=_run, on_loss=OnLoss.GO_ON)


def _run(arguments: argparse.Namespace) -> int:
    from ps_server.commands.serving import serve_as_told

    return serve_as_told(arguments)


def _data_port(text: str) -> int | None:
    if text == "off":
        return None
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is neither a port, 0 to 65535, nor off")
    return value
