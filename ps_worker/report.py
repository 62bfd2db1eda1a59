"""Draws a run's metrics.jsonl: `python -m ps_worker.report RUN_DIR` writes curves.png and TensorBoard events.

It runs as a separate process because its imports are slow; it can be killed at any time.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch.utils.tensorboard import SummaryWriter

from modelaverage.names import file_name, shown
from ps_worker.demo.digits_config import ALONE, ALONE_WITH_ALL, PLAIN
from ps_worker.demo.record import Record
from ps_worker.demo.run_files import CURVES, METRICS, TENSORBOARD

__all__ = ["draw", "main", "write_tensorboard"]

# Okabe and Ito's colours, which people with any colour vision can tell apart; lone workers also have dashed lines.
_WORKER_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#D55E00")
_CENTER_COLOUR = "#009E73"
_ALONE_STYLE: dict[str, Any] = {"color": "#444444", "linestyle": (0, (4, 2))}
_LONE_STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": "#7B3294", "linestyle": (0, (6, 1.5, 1.5, 1.5))},
    ALONE: _ALONE_STYLE,
    ALONE_WITH_ALL: {"color": "#8C5A2B", "linestyle": (0, (1, 1.2))},
}
_NEIGHBOURS = 4
_LONGEST_LABEL = 30


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
    """Draws loss and test accuracy over steps, and barrier wait over time, as one PNG. Raises OSError."""
    workers = [worker for worker in sorted(record.steps) if worker not in _LONE_STYLES]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, wait = figure.subplots(1, 3)
    _draw_loss(loss, record, workers)
    _draw_accuracy(accuracy, record, workers)
    _draw_wait(wait, record, workers)
    for axes in (loss, accuracy, wait):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks a letter of a worker's name
        figure.savefig(path, dpi=120)


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


def _draw_loss(axes: Axes, record: Record, workers: Sequence[str]) -> None:
    for worker, style in [*_styles(workers), *_lone_styles(record)]:
        events = record.steps[worker]
        steps, losses = [event.step for event in events], np.array([event.loss for event in events])
        axes.plot(steps, losses, color=style["color"], alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(losses), label=_label(worker, workers), linewidth=1.6, **style)
    axes.set(title="Training loss (on a worker's own images)", xlabel="local step", ylabel="cross-entropy [nats]")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, record: Record, workers: Sequence[str]) -> None:
    chief = workers[0] if workers else ""
    lines: list[tuple[str, str, dict[str, Any]]] = [(chief, _averaged(workers), {"color": _CENTER_COLOUR})]
    lines += [(worker, _label(worker, workers), style) for worker, style in _lone_styles(record)]
    found = [event.accuracy for worker, _, _ in lines for event in record.accuracies[worker]]
    for worker, label, style in lines:
        events = record.accuracies[worker]
        if events:
            last = f"{events[-1].accuracy:.1%}  {label}"
            axes.plot([e.step for e in events], [e.accuracy for e in events], label=last, linewidth=1.6, **style)
    axes.set(
        title="Test accuracy, the same number of steps for all",
        xlabel="local step",
        ylabel="test images classified right",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if found:
        axes.set_ylim(max(0.0, float(np.quantile(found, 0.05)) - 0.03), 1.0)
        axes.legend(frameon=False, loc="lower right", title="at the end", alignment="left", fontsize="small")


def _draw_wait(axes: Axes, record: Record, workers: Sequence[str]) -> None:
    starts = [record.steps[worker][0].unix_time_s for worker in workers if record.steps[worker]]
    for worker, style in _styles(workers):
        rounds = record.rounds[worker]
        times_s = [event.unix_time_s - min(starts) for event in rounds]
        waits_ms = [1000 * event.waited_s for event in rounds]
        axes.plot(
            times_s,
            waits_ms,
            ".",
            markersize=6,
            clip_on=False,
            label=f"{_label(worker, workers)}: {sum(waits_ms) / 1000:.1f} s",
            **style,
        )
    axes.set(title="Wait at the barrier, each round", xlabel="time since the first steps [s]", ylabel="wait [ms]")
    axes.set_ylim(bottom=0)
    if axes.lines:  # a run that continues from a center may have no round
        axes.legend(frameon=False, title="altogether", alignment="left")


def _styles(workers: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(worker, {"color": _WORKER_COLOURS[i % len(_WORKER_COLOURS)]}) for i, worker in enumerate(workers)]


def _lone_styles(record: Record) -> list[tuple[str, dict[str, Any]]]:
    return [(worker, style) for worker, style in _LONE_STYLES.items() if record.steps[worker]]


def _averaged(workers: Sequence[str]) -> str:
    count = len(workers)
    return "center" if count < 2 else f"center: {count} workers, 1/{count} of the images each"


def _label(worker: str, workers: Sequence[str]) -> str:
    if worker == ALONE:
        return "one worker alone" + (f", 1/{len(workers)} of the images" if len(workers) > 1 else "")
    if worker == PLAIN:
        return f"plain average: {len(workers)} workers"
    if worker == ALONE_WITH_ALL:
        return "one worker alone, all images"
    text = shown(worker)
    if len(text) > _LONGEST_LABEL:  # a longer label would leave no room for the curves
        text = text[: _LONGEST_LABEL - 1] + "\u2026"
    # matplotlib takes a dollar for a formula, and leaves a label that begins with an underscore out of the legend.
    text = text.replace("$", r"\$")
    return f"'{text}'" if text.startswith("_") else text


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of each value and the same number of neighbours on either side, at most `_NEIGHBOURS`."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), _NEIGHBOURS)
    starts, ends = at - reach, at + reach + 1
    means: np.ndarray[Any, np.dtype[np.float64]] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


if __name__ == "__main__":
    sys.exit(main())
