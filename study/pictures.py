"""The pictures of the page: SVG that is read without colours and on a narrow screen; equal results give equal files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from study.links import TimeToLoss
from study.results import ArmResult

__all__ = ["draw_bytes", "draw_intervals", "draw_kills", "draw_steps", "draw_times"]

_INCHES = (4.2, 4.4)
"""400 pixels wide, as large as it is read; letters have 9 points."""
_LINES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))
_MARKERS = "osD^vxP*"
_BLACK, _GREY = "#111111", "#6b6b6b"
_SETTINGS: Any = {"svg.hashsalt": "study", "svg.fonttype": "path", "font.size": 9, "axes.formatter.useoffset": False}


def draw_steps(results: Sequence[ArmResult], path: Path) -> None:
    """Held-out loss over steps. Raises OSError."""
    figure, axes = _begun("local steps of each worker", "held-out loss of the center, nats")
    for index, each in enumerate(results):
        steps = [point.step for point in each.curve]
        losses = [point.held_out_loss for point in each.curve]
        axes.plot(steps, losses, **_look(index), label=each.name)
    axes.set_yscale("log")
    _finish(figure, axes, path)


def draw_bytes(results: Sequence[ArmResult], path: Path) -> None:
    """Held-out loss over the bytes of one worker, of all arms that send any. Raises OSError."""
    figure, axes = _begun("MB of one worker, up and down", "held-out loss of the center, nats")
    for index, each in enumerate(results):
        points = [point for point in each.curve if point.link_bytes]
        if points:
            megabytes = [point.link_bytes / 1e6 for point in points]
            axes.plot(megabytes, [point.held_out_loss for point in points], **_look(index), label=each.name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    _finish(figure, axes, path)


def draw_intervals(series: Sequence[tuple[str, Sequence[ArmResult]]], path: Path) -> None:
    """Difference from synchronous training over the interval, one line for each name. Raises OSError."""
    figure, axes = _begun("local steps between two rounds", "held-out loss over synchronous training, %")
    ticks = set[int]()
    for index, (name, results) in enumerate(series):
        found = sorted(results, key=lambda each: each.planned.template.interval_steps)
        intervals = [each.planned.template.interval_steps for each in found]
        ticks.update(intervals)
        spreads = [each.difference_spread or 0.0 for each in found]
        differences = [each.difference_percent for each in found]
        axes.errorbar(intervals, differences, yerr=spreads, **_look(index), label=name, capsize=2)
    axes.axhline(0.0, color=_GREY, linewidth=0.8)
    axes.set_xscale("log")
    # A label needs room on the logarithmic axis.
    shown = [tick for tick in sorted(ticks) if not any(tick / 1.15 < other < tick for other in ticks)]
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.minorticks_off()
    _finish(figure, axes, path)


def draw_kills(results: Sequence[ArmResult], path: Path) -> None:
    """Like `draw_steps`, from the first tenth of the run on. Raises OSError."""
    figure, axes = _begun("local steps of each worker", "held-out loss of the center, nats")
    for index, each in enumerate(results):
        points = [point for point in each.curve if 10 * point.step >= each.planned.template.steps]
        axes.plot(
            [point.step for point in points],
            [point.held_out_loss for point in points],
            **_look(index),
            label=each.name,
        )
    axes.set_yscale("log")
    _finish(figure, axes, path)


def draw_times(times: Sequence[TimeToLoss], synchronous: str, path: Path) -> None:
    """Time to the loss of synchronous training over the rate of the links. Raises OSError."""
    figure, axes = _begun("Mbit/s of every link", "seconds to synchronous training's loss")
    rates = sorted({each.rate_mbit for each in times})
    arms = dict.fromkeys(each.arm for each in times if each.seconds is not None)
    for index, arm in enumerate(arms):
        found = sorted((each.rate_mbit, each.seconds) for each in times if each.arm == arm and each.seconds is not None)
        name = f"{arm} (all-reduce)" if arm == synchronous else arm
        axes.plot([rate for rate, _ in found], [seconds for _, seconds in found], **_look(index), label=name)
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_yscale("log")
    _finish(figure, axes, path)


def _look(index: int) -> dict[str, Any]:
    """Lines differ in dashes and markers; the shade only helps."""
    return {
        "color": _BLACK if index % 2 == 0 else _GREY,
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.3,
        "markerfacecolor": "white",
    }


def _begun(across: str, up: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        if high < 10 * low:  # less than a decade has no ticks of its own
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    with matplotlib.rc_context(_SETTINGS):
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower left", ncols=1, frameon=False, handlelength=4.0)
        FigureCanvasSVG(figure)
        figure.savefig(path, format="svg", metadata={"Date": None})
