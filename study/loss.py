"""The loss with compression beside the loss without: `python -m study.loss`.

Four workers and a server, played in one process on one thread, learn the digits and bytes of Python source; with the
codecs raw, int8 and int4; with a step of the outer optimizer every 50 local steps and a plain average every 5; three
seeds each. Arms that differ only in the codec have the same initial values and batches. Every finished training is kept
in `runs/study`; the command again makes those that are missing and prints the table. All of it takes about an hour
beside other work. Two processes (`--tasks digits`, `--tasks text`) may share the work.

    python -m study.loss --quick                       one seed, few steps: what it does
    python -m study.loss                               the table
    python -m study.loss --codecs raw bfloat16         another codec
    python -m study.loss --tune                        raw with several learning rates, on a seed of its own
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from modelaverage.codecs import CODECS, RAW
from modelaverage.commands import flag_types
from study.compare import rows_of, table_of
from study.kept import KeptArms, Training
from study.making import made
from study.picture import draw
from study.play import Arm
from study.tasks import TASKS

__all__ = ["Scale", "arms_of", "main"]

_SCHEDULES = ((50, "sgd:lr=1.0,momentum=0.6,nesterov"), (5, "average"))
"""Interval in steps, and outer optimizer."""
_RATES = {("digits", 50): 0.005, ("digits", 5): 0.02, ("text", 50): 4e-3, ("text", 5): 8e-3}
"""The best of `_TRIED` for raw by held-out loss with `_TUNING_SEED`, by task and interval."""
_TRIED = {"digits": (0.005, 0.01, 0.02, 0.04, 0.06), "text": (2e-3, 4e-3, 8e-3)}
_TUNING_SEED = 100


_WIDTH = 165
"""Columns that the table needs; a narrower terminal wraps its lines."""


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Args:
        steps: of each worker, by task.
        seeds: from 0 on.
    """

    steps: dict[str, int]
    seeds: int


_WHOLE = Scale({"digits": 1200, "text": 800}, seeds=3)
_QUICK = Scale({"digits": 100, "text": 50}, seeds=1)


def arms_of(task: str, codecs: Sequence[str], scale: Scale) -> list[Arm]:
    """Every arm of a task, seed by seed, so that a study that is cut off can be compared, too."""
    return [
        Arm(task, codec, outer, interval_steps, _RATES[task, interval_steps], seed, scale.steps[task])
        for seed, (interval_steps, outer), codec in itertools.product(range(scale.seeds), _SCHEDULES, codecs)
    ]


def _tuning_arms(task: str, scale: Scale) -> list[Arm]:
    return [
        Arm(task, RAW.name, outer, interval_steps, rate, _TUNING_SEED, scale.steps[task])
        for (interval_steps, outer), rate in itertools.product(_SCHEDULES, _TRIED[task])
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m study.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, in a directory of their own")
    parser.add_argument("--tune", action="store_true", help="raw with several learning rates instead of the study")
    parser.add_argument("--table", action="store_true", help="only what is finished already; trains nothing")
    parser.add_argument("--tasks", nargs="+", choices=tuple(_TRIED), default=tuple(_TRIED), help="(all)")
    parser.add_argument(
        "--codecs", nargs="+", choices=tuple(CODECS), default=("raw", "int8", "int4"), help="with raw (raw int8 int4)"
    )
    parser.add_argument("--seeds", type=flag_types.count, metavar="N", help="from 0 on (3, with --quick 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    scale = _QUICK if arguments.quick else _WHOLE
    if arguments.seeds:
        scale = Scale(scale.steps, arguments.seeds)
    directory: Path = arguments.runs / "quick" if arguments.quick else arguments.runs
    codecs = [name for name in CODECS if name in {RAW.name, *arguments.codecs}]
    os.nice(19)  # it takes long, and waits for nothing
    console = Console()
    try:
        trainings = list[Training]()
        for task in (TASKS[name]() for name in arguments.tasks):
            arms = _tuning_arms(task.name, scale) if arguments.tune else arms_of(task.name, codecs, scale)
            kept = KeptArms(directory)
            trainings += kept.all_of(arms, task.source) if arguments.table else made(task, arms, kept, console)
        if not trainings:
            console.print(f"no finished training lies in {directory}", soft_wrap=True)
        elif arguments.tune:
            _print_tuning(trainings, console)
        else:
            _print_study(trainings, directory, console)
    except KeyboardInterrupt:
        console.print(f"stopped; finished trainings are in {directory}, and the same command goes on", soft_wrap=True)
        return 130
    except OSError as error:
        print(f"study.loss: {error}", file=sys.stderr)
        return 1
    return 0


def _print_tuning(trainings: Sequence[Training], console: Console) -> None:
    for each in trainings:
        arm = each.arm
        console.print(
            f"{arm.task}, a round every {arm.interval_steps}, {arm.outer}, learning rate {arm.learning_rate:g}, seed "
            f"{arm.seed}: held-out loss {each.last.held_out_loss:.4f}",
            soft_wrap=True,
            highlight=False,
        )


def _print_study(trainings: Sequence[Training], directory: Path, console: Console) -> None:
    rows = rows_of(trainings)
    Console(width=max(_WIDTH, console.width)).print(table_of(rows))
    result, picture = directory / "loss.json", directory / "loss.png"
    sources = sorted({each.source for each in trainings})
    shown = {"sources": sources, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}
    result.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    draw(trainings, picture)
    console.print(f"data: {'; '.join(sources)}\nwritten: {result}, {picture}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
