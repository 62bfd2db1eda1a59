"""`ps-worker curves`: draws what the workers of a run have logged."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelaverage.commands.parser import help_format
from ps_worker.commands.extras import require
from ps_worker.curves.run_directory import CURVES, ROUNDS

if TYPE_CHECKING:
    from ps_worker.curves.curve import Curve

__all__ = ["add_curves_command"]

_EXAMPLES = """\
examples:
  ps-worker curves runs/2026-11-30_12-00-00                     of a run of ma-launch; draws curves.png there, too
  MA_ROUND_LOG=rounds ps-worker run --ps-hosts ... train.py     anywhere else: each worker writes rounds/WORKER.jsonl,
  ps-worker curves rounds                                       and this draws all of them, also while they train
  ps-worker curves worker-0.jsonl worker-1.jsonl --out loss.png
"""


def add_curves_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to a parser's."""
    command = commands.add_parser(
        "curves",
        help="draw the loss of a run over steps, seconds and megabytes",
        description="Plots the loss that workers reported with their rounds, in the terminal and, if matplotlib is\n"
        "installed, as a picture. Workers log their rounds under ma-launch, and where MA_ROUND_LOG names a directory.",
        epilog=_EXAMPLES,
        formatter_class=help_format,
    )
    command.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="directory of a run, or of logs; or logs themselves"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where to write the picture, a PNG ({CURVES} in the first directory)"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, OSError, MissingExtraError."""
    from ps_worker.curves.text import plotted

    paths: Sequence[Path] = arguments.paths
    curves = _curves(paths)
    out: Path | None = arguments.out
    if out is None and paths[0].is_dir():
        out = paths[0] / CURVES
    if arguments.out is not None:
        require(["matplotlib"])
    lines = plotted(curves, shutil.get_terminal_size().columns)
    print(*(lines or ["no loss is finite"]), sep="\n")
    if out is None:
        return
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    from ps_worker.curves.picture import draw

    draw(curves, out)
    print(f"written to {out}")


def _curves(paths: Sequence[Path]) -> list[Curve]:
    from ps_worker.curves.logs import curves_in, curves_of_files  # not above: imports gRPC

    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no {str(path)!r}")
    directories = [path for path in paths if path.is_dir()]
    if len(directories) == len(paths) == 1:
        (directory,) = directories
        logs = directory / ROUNDS
        found = curves_in(logs if logs.is_dir() else directory)
    elif directories:
        raise ValueError(f"give one directory, or only files: {str(directories[0])!r} is a directory")
    else:
        found = curves_of_files(paths)
    if not found:
        raise ValueError(
            f"no round with a loss is logged in {', '.join(map(str, paths))}: workers log their rounds where "
            "MA_ROUND_LOG names a directory, if they report a loss (`optimizer.loss = ...`, or "
            "`push_and_average(..., loss=...)`)"
        )
    return found
