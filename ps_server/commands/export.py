"""`ps-server export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modelaverage.commands import flag_types
from modelaverage.commands.security_flags import add_security_flags, security_of
from modelaverage.commands.slow import says_if_slow
from modelaverage.runtime.output import OnLoss
from ps_server.commands.subparsers import SubParsers

__all__ = ["add_export"]

_EXAMPLES = """\
examples:
  ps-server export center/ model.safetensors           the newest usable checkpoint; a server may be using the directory
  ps-server export center/ model.safetensors --with-outer-state   with the momentum and the like of its outer optimizer
  ps-server export 127.0.0.1:2222 model.safetensors    a server's current center
  ps-server export ps0:2222 ps1:2222 model.safetensors   the whole model of a job with two servers, in their order
"""


def add_export(commands: SubParsers) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "export",
        help="write the center variables to a safetensors file",
        description="Writes the center variables as they are to a safetensors file, for torch and anything else that "
        "reads such files; the file's metadata has the global_step.",
        epilog=_EXAMPLES,
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
    command.set_defaults(run=_run, on_loss=OnLoss.DROP)  # the command's result is the file


def _run(arguments: argparse.Namespace) -> int:
    from modelaverage.access.channels import Access
    from ps_server.console.export import ExportError, export

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
