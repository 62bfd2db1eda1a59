"""The command `python -m modelaverage.conformance`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys

# gRPC's own log would be full of lost connections; set before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from modelaverage import __version__
from modelaverage.commands.flag_types import count
from modelaverage.conformance.cases import CASES
from modelaverage.conformance.run import Result, run

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m modelaverage.conformance examples/clients/node/client conform
  python -m modelaverage.conformance --only float32_is_averaged python examples/clients/python/client.py conform
  python -m modelaverage.conformance --list
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 if the client passed every case, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m modelaverage.conformance",
        usage="%(prog)s [--only NAME] [--list] [--jobs N] COMMAND...",
        description="Plays a client through every case that it must get right, and prints a table. "
        "docs/conformance.md says what COMMAND has to do.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this case; may be repeated (all)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and exit")
    parser.add_argument(
        "--jobs",
        type=count,
        default=2 * (os.cpu_count() or 1),
        metavar="N",
        help="how many cases to play at the same time (twice the number of processors)",
    )
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="the client program; for every worker it is started as COMMAND ADDRESS WORKER_ID",
    )
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(case.name for case in CASES))
        return 0
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if len(command) == 1:
        command = shlex.split(command[0])
    if not command:
        parser.error("give the COMMAND of the client program")
    if shutil.which(command[0]) is None:
        parser.error(f"there is no program {command[0]!r} to run")
    unknown = set(arguments.only or ()) - {case.name for case in CASES}
    if unknown:
        parser.error(f"there is no case {min(unknown)!r}; --list names all")
    cases = [case for case in CASES if arguments.only is None or case.name in arguments.only]
    done = list[Result]()

    def tell(result: Result) -> None:
        done.append(result)
        how = "missed" if result.miss else "passed"
        print(f"[{len(done)}/{len(cases)}] {result.name}: {how}", file=sys.stderr, flush=True)

    try:
        results = run(cases, command, arguments.jobs, tell)
    except KeyboardInterrupt:
        return 130
    print("\n".join(_table(results)))
    return 1 if any(result.miss for result in results) else 0


def _table(results: list[Result]) -> list[str]:
    width = max(len(result.name) for result in results)
    lines = [f"{'case':{width}}  seconds  result", f"{'-' * width}  -------  ------"]
    for result in results:
        lines.append(f"{result.name:{width}}  {result.took_s:7.1f}  {'missed' if result.miss else 'passed'}")
        if result.miss:
            lines += [f"    expected: {result.miss.expected}", f"    got:      {result.miss.came}"]
    missed = sum(result.miss is not None for result in results)
    return [*lines, "", f"{len(results)} cases, {len(results) - missed} passed, {missed} missed"]


if __name__ == "__main__":
    sys.exit(main())
