"""The command `ps-server`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from itertools import zip_longest

# gRPC's own log prints a page of C++ for a port in use. Must be set before gRPC is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from modelaverage import __version__
from modelaverage.errors import SecurityError
from modelaverage.logs import event, keep_logging
from modelaverage.runtime.output import CLOSED_PIPE_EXIT_CODE, OutputLostError
from ps_server.commands.export import add_export
from ps_server.commands.serve import add_serve
from ps_server.commands.status import add_status
from ps_server.unusable import UnusableSettingError

__all__ = ["main"]

_log = logging.getLogger("ps_server")


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
    add_serve(commands)
    add_status(commands)
    add_export(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
