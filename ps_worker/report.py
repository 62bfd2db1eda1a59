"""Draws a run's metrics.jsonl: `python -m ps_worker.report RUN_DIR` writes curves.png and TensorBoard events.

It runs as a separate process because its imports are slow; it can be killed at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch.utils.tensorboard import SummaryWriter

from modelaverage.names import file_name
from ps_worker.curves import picture
from ps_worker.curves.curve import Curve
from ps_worker.curves.metrics import curves_of
from ps_worker.demo.digits_config import ALONE, ALONE_WITH_ALL, LONE, PLAIN
from ps_worker.demo.record import Record
from ps_worker.demo.run_files import CURVES, METRICS, TENSORBOARD

__all__ = ["draw", "main", "write_tensorboard"]

_CENTER_STYLE: dict[str, Any] = {"color": "#000000", "linewidth": 2.0}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ps_worker.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=f"a run's directory, with {METRICS}")
    run_dir: Path = parser.parse_args(argv).run_dir
    try:
        record = Record.read(run_dir / METRICS)
        draw(record, run_dir / CURVES)
        write_tensorboard(record, run_dir / TENSORBOARD)
    except (OSError, ValueError) as error:
        print(f"ps_worker.report: {error}", file=sys.stderr)
        return 1
    return 0


def draw(record: Record, path: Path) -> None:
    """Draws the curves of the training loss, test accuracy over steps, and barrier wait over time, as one PNG. Raises
    OSError."""
    curves = curves_of(event for events in record.steps.values() for event in events)
    workers = [curve.name for curve in curves if curve.name not in LONE]
    titled = [replace(curve, title=_title(curve.name, len(workers))) for curve in curves]
    picture.draw(titled, path, [partial(_accuracy, record, titled), partial(_wait, record, titled)])


def write_tensorboard(record: Record, directory: Path) -> None:
    """Writes one TensorBoard run for each worker and each server, with the events' own times. Raises OSError."""
    for worker in sorted(record.steps):
        with SummaryWriter(str(directory / file_name(worker))) as writer:
            for step in record.steps[worker]:
                for name, value in (("loss", step.loss), ("samples_per_s", step.samples_per_s)):
                    writer.add_scalar(name, value, step.step, step.unix_time_s)
            for found in record.accuracies[worker]:
                for name, value in (("test_accuracy", found.accuracy), ("test_loss", found.loss)):
                    writer.add_scalar(name, value, found.step, found.unix_time_s)
            for round_ in record.rounds[worker]:
                writer.add_scalar("barrier_wait_s", round_.waited_s, round_.step, round_.unix_time_s)
    for server, samples in sorted(record.servers.items()):
        with SummaryWriter(str(directory / file_name(server))) as writer:
            for sample in samples:
                moved_bytes = sample.received_bytes + sample.sent_bytes
                writer.add_scalar("moved_bytes", moved_bytes, sample.global_step, sample.unix_time_s)


def _accuracy(record: Record, curves: Sequence[Curve], axes: Axes) -> None:
    workers = [curve for curve in curves if curve.name not in LONE]
    found = list[float]()
    for index, curve in enumerate(curves):
        if curve in workers[1:]:
            continue  # the center is evaluated by its chief
        events = record.accuracies[curve.name]
        if events:
            title, style = (_averaged(len(workers)), _CENTER_STYLE) if curve in workers else ("", picture.look(index))
            text = f"{events[-1].accuracy:.1%}  {title or curve.title}"
            axes.plot([e.step for e in events], [e.accuracy for e in events], label=text, **style)
            found += [event.accuracy for event in events]
    axes.set(title="Test images classified right, and at the end", xlabel="local steps of each worker")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if found:
        axes.set_ylim(max(0.0, float(np.quantile(found, 0.05)) - 0.03), 1.0)
        axes.legend(frameon=False, loc="lower right", fontsize=8)


def _wait(record: Record, curves: Sequence[Curve], axes: Axes) -> None:
    workers = [(index, curve) for index, curve in enumerate(curves) if curve.name not in LONE]
    starts = [curve.began_at_s for _, curve in workers]
    for index, curve in workers:
        rounds = record.rounds[curve.name]
        look = picture.look(index)
        axes.plot(
            [event.unix_time_s - min(starts) for event in rounds],
            [1000 * event.waited_s for event in rounds],
            look["marker"],
            color=look["color"],
            markersize=4.5,
            markerfacecolor="white",
            clip_on=False,
        )
    axes.set(title="Wait at the barrier, each round", xlabel="seconds since the start", ylabel="ms")
    axes.set_ylim(bottom=0)


def _averaged(count: int) -> str:
    return "center" if count < 2 else f"center of {count} workers"


def _title(worker: str, num_workers: int) -> str:
    if worker == ALONE:
        return "one worker alone" + (f", 1/{num_workers} of the images" if num_workers > 1 else "")
    if worker == PLAIN:
        return "worker-0, with plain averages"
    if worker == ALONE_WITH_ALL:
        return "one worker alone, all images"
    return ""


if __name__ == "__main__":
    sys.exit(main())
