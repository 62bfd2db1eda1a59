"""The command `ma-launch`: a parameter server and its workers on this machine. The only place that reads its flags."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ps_worker import flags
from ps_worker.digits_config import MODULES, DigitsConfig, add_training_flags
from ps_worker.extras import MissingExtraError, require
from ps_worker.stop_signals import end_at_once_on_signals

__all__ = ["main"]

_EXAMPLES = """\
examples:
  ma-launch --workers 2 -- digits                        the built-in workload
  ma-launch --workers 2 -- digits --steps 400 --seed 1   `ma-launch -- digits --help` lists its flags
  ma-launch --workers 4 -- train.py --epochs 3           your script, in four processes; worker-0 is the chief

The workers' lines are printed with the worker's name. A worker that fails ends the run, with its last lines; Ctrl-C
ends it, too. Unless OMP_NUM_THREADS is set, the workers share the processor cores evenly.
"""
_DIGITS_EXAMPLES = """\
examples:
  ma-launch --workers 2 -- digits
  ma-launch --workers 4 --runs /tmp/runs -- digits --steps 400 --interval-steps 50 --seed 1
"""
_DIGITS = "digits"
_DEMO_MODULES = (*MODULES, "rich", "matplotlib", "tensorboard")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    end_at_once_on_signals()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parser = _parser()
    own, command = _split(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(own)
    if not command:
        parser.error("say after -- what the workers run: `-- digits`, or `-- SCRIPT [ARGS...]`")
    if unknown:
        parser.error(f"there is no argument {unknown[0]}")
    if arguments.ps != 1:
        parser.error(f"--ps {arguments.ps}: only one parameter server is possible so far; leave --ps out, or give 1")
    from ps_worker.supervise import run_digits, run_script

    if command[0] != _DIGITS:
        try:
            script = flags.script(command[0])
        except argparse.ArgumentTypeError as error:
            parser.error(f"SCRIPT: {error}")
        return run_script(arguments.workers, [str(script), *command[1:]])
    digits_parser = _digits_parser()
    try:
        training = DigitsConfig.from_flags(digits_parser.parse_args(command[1:]))
        require(_DEMO_MODULES)
    except ValueError as error:
        digits_parser.error(str(error))
    except MissingExtraError as error:
        print(f"ma-launch: {error}", file=sys.stderr)
        return 1
    return run_digits(arguments.workers, training, arguments.runs)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and what comes after the first `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        prog="ma-launch",
        usage="ma-launch [--ps 1] [--workers N] [--runs DIR] -- digits|SCRIPT [ARGS...]",
        description="Starts a parameter server and its workers as processes of this machine, on loopback, and ends\n"
        "all of them when the workers are done.",
        epilog=_EXAMPLES,
        formatter_class=flags.help_format,
    )
    parser.add_argument(
        "--ps", type=flags.whole, default=1, metavar="N", help="parameter servers; only 1 so far (%(default)s)"
    )
    parser.add_argument("--workers", type=flags.count, default=2, metavar="N", help="worker processes (%(default)s)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="digits: write the run's files to DIR/<time>/ (%(default)s)",
    )
    return parser


def _digits_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        prog="ma-launch -- digits",
        description="Trains a small network on scikit-learn's handwritten digits, in all workers together and then in\n"
        "one worker alone; shows both, and writes center.safetensors, summary.json, metrics.jsonl,\n"
        "curves.png and TensorBoard events.",
        epilog=_DIGITS_EXAMPLES,
        formatter_class=flags.help_format,
    )
    add_training_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
