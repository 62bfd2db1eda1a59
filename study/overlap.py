"""The loss when centers arrive late, as with `overlap_steps`: `python -m study.overlap`.

Four workers and a server, played in one process on one thread, learn bytes of Python source: a round every 50 steps
with an outer optimizer and int4. In the arm "none" a worker waits for each center; in the others it trains 10 more
steps and then keeps these on top of the center (the optimizer's rule), drops them, or goes on half-way between its
variables and the center. All arms have the same initial values and batches. Finished trainings are kept as those of
`study.loss` are. All of it takes about a quarter of an hour on one free processor.

    python -m study.overlap --quick                    one seed, few steps: what it does
    python -m study.overlap                            the table
    python -m study.overlap --tune                     every arm with several learning rates, on a seed of its own
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modelaverage.commands import flag_types
from study.compare import shown, spread_of
from study.kept import KeptArms, Training
from study.late import LATE_RULES
from study.making import made
from study.play import Arm
from study.tasks import TASKS

__all__ = ["OverlapRow", "main", "overlap_rows_of"]

_TASK, _CODEC, _INTERVAL_STEPS, _OUTER = "text", "int4", 50, "sgd:lr=1.0,momentum=0.6,nesterov"
_LATE_STEPS = 10
_RATE = 4e-3
_TRIED, _TUNING_SEED = (2e-3, 4e-3, 8e-3), 100
_STEPS, _QUICK_STEPS = 1500, 100
_WIDTH = 110
"""Columns that the table needs."""
_NONE = "none"
"""How the arm without late centers is called."""


@dataclass(frozen=True)
class OverlapRow:
    """One rule, over the seeds.

    Args:
        rule: a key of `LATE_RULES`, or "none".
        learning_rate: of the workers' optimizers.
        held_out_losses: of the center, in nats, by seed.
        train_loss: mean over the seeds.
        differences: of held-out loss from "none" with the same seed, by seed.
    """

    rule: str
    learning_rate: float
    held_out_losses: tuple[float, ...]
    train_loss: float
    differences: tuple[float, ...]


def _arms(seeds: Sequence[int], rates: Sequence[float], steps: int) -> list[Arm]:
    """Seed by seed, so that a study that is cut off can be compared, too."""
    late = {_NONE: 0, **dict.fromkeys(LATE_RULES, _LATE_STEPS)}
    return [
        Arm(
            _TASK,
            _CODEC,
            _OUTER,
            _INTERVAL_STEPS,
            rate,
            seed,
            steps,
            late_steps=late_steps,
            late_rule="keep" if rule == _NONE else rule,
        )
        for seed in seeds
        for rate in rates
        for rule, late_steps in late.items()
    ]


def _rule_of(arm: Arm) -> str:
    return arm.late_rule if arm.late_steps else _NONE


def overlap_rows_of(trainings: Sequence[Training]) -> list[OverlapRow]:
    """One row for each rule and learning rate, in the order in which they come. A rule counts only with seeds with
    which "none" was run at that rate, too; without any, it has no row."""
    groups = dict[tuple[float, str], dict[int, Training]]()
    for each in trainings:
        groups.setdefault((each.arm.learning_rate, _rule_of(each.arm)), {})[each.arm.seed] = each
    rows = list[OverlapRow]()
    for (rate, rule), by_seed in groups.items():
        none = groups.get((rate, _NONE), {})
        seeds = sorted(by_seed.keys() & none.keys())
        if not seeds:
            continue
        losses = tuple(by_seed[seed].last.held_out_loss for seed in seeds)
        differences = tuple(loss - none[seed].last.held_out_loss for loss, seed in zip(losses, seeds, strict=True))
        train_loss = statistics.fmean(by_seed[seed].train_loss for seed in seeds)
        rows.append(OverlapRow(rule, rate, losses, train_loss, differences))
    return rows


def _table_of(rows: Sequence[OverlapRow]) -> Table:
    caption = f"nats, +- the standard deviation over the seeds; centers {_LATE_STEPS} steps late"
    table = Table(caption=caption, caption_justify="left")
    for title in ("rule", "learning rate", "seeds", "held-out loss", "train loss", "less none"):
        table.add_column(title, no_wrap=True, justify="right" if title == "seeds" else "left")
    for row in rows:
        table.add_row(
            row.rule,
            f"{row.learning_rate:g}",
            str(len(row.held_out_losses)),
            shown(statistics.fmean(row.held_out_losses), spread_of(row.held_out_losses)),
            f"{row.train_loss:.4f}",
            "" if row.rule == _NONE else shown(statistics.fmean(row.differences), spread_of(row.differences), "+"),
        )
    return table


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m study.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, in a directory of their own")
    parser.add_argument("--tune", action="store_true", help="several learning rates instead of the study")
    parser.add_argument("--table", action="store_true", help="only what is finished already; trains nothing")
    parser.add_argument("--seeds", type=flag_types.count, metavar="N", help="from 0 on (3, with --quick 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.runs / "quick" if arguments.quick else arguments.runs
    steps = _QUICK_STEPS if arguments.quick else _STEPS
    seeds = [_TUNING_SEED] if arguments.tune else range(arguments.seeds or (1 if arguments.quick else 3))
    arms = _arms(seeds, _TRIED if arguments.tune else (_RATE,), steps)
    os.nice(19)  # it takes long, and waits for nothing
    console = Console()
    try:
        task, kept = TASKS[_TASK](), KeptArms(directory)
        trainings = kept.all_of(arms, task.source) if arguments.table else list(made(task, arms, kept, console))
        if not trainings:
            console.print(f"no finished training lies in {directory}", soft_wrap=True)
            return 0
        Console(width=max(_WIDTH, console.width)).print(_table_of(overlap_rows_of(trainings)))
        console.print(f"data: {task.source}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        console.print(f"stopped; finished trainings are in {directory}, and the same command goes on", soft_wrap=True)
        return 130
    except OSError as error:
        print(f"study.overlap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
