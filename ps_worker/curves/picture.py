"""Curves as a picture: panels one below the other, so that it is read on a narrow screen, and without colours.

Imports matplotlib, which takes a second.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from modelaverage.commands.columns import shortened
from modelaverage.names import shown
from ps_worker.curves.curve import Curve, Point, began_at_s, is_wide, thinned

__all__ = ["Panel", "draw", "label", "look"]

Panel = Callable[[Axes], None]
"""Draws a panel of its own into axes."""

_WIDTH_INCHES, _PANEL_INCHES, _LEGEND_ROW_INCHES = 4.2, 2.3, 0.17
_DPI = 200  # 840 pixels wide: sharp where it is shown at 400
_FONT_POINTS = 9
# Okabe and Ito's colours, which people with any colour vision can tell apart. Dashes and markers differ, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C5A2B")
_DASHES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))
_MARKERS = "osD^vxP*"
_MARKS_A_LINE = 7
_MOST_POINTS = 60
_NAME_CHARACTERS = 30
_NAMED = 24
_DECADES = 500.0  # over a wider range, only powers of ten are marked


def draw(curves: Sequence[Curve], path: Path, more: Sequence[Panel] = ()) -> None:
    """Writes a PNG: the loss over steps, over seconds, and over the megabytes of each worker.

    Args:
        curves: of the workers; at most 24 are named.
        path: of the file.
        more: further panels.

    Raises:
        OSError: the file cannot be written.
    """
    named = min(len(curves), _NAMED)
    panels: list[Panel] = [
        lambda axes: _over_steps(axes, curves),
        lambda axes: _over_seconds(axes, curves),
        lambda axes: _over_bytes(axes, curves),
        *more,
    ]
    height = len(panels) * _PANEL_INCHES + (named + 2) * _LEGEND_ROW_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(panels), 1), panels, strict=True):
        axes.tick_params(labelsize=_FONT_POINTS - 1)
        panel(axes)
        first, last = axes.get_xlim()
        if first < last / 2:  # a run that goes on from another begins far to the right
            axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_fontsize(_FONT_POINTS)
    lines = figure.axes[0].get_lines()[:named]
    if lines:
        title = f"{len(curves)} curves, {named} of them named" if len(curves) > named else None
        names = [str(line.get_label()) for line in lines]
        figure.legend(lines, names, loc="outside upper left", frameon=False, handlelength=4.0, fontsize=8, title=title)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks a letter of a worker's name
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=_DPI)
    path.write_bytes(picture.getvalue())


def look(index: int) -> dict[str, Any]:
    """How the line of this curve is drawn."""
    lap = index // len(_DASHES)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[(index + lap) % len(_MARKERS)],
        "markersize": 4.5,
        "markerfacecolor": "white",
        "linewidth": 1.3,
    }


def label(name: str) -> str:
    """A name as matplotlib shows it literally."""
    text = shortened(shown(name), _NAME_CHARACTERS)  # a longer label would leave no room for the curves
    # matplotlib takes a dollar for a formula, and leaves a label that begins with an underscore out of the legend.
    text = text.replace("$", r"\$")
    return f"'{text}'" if text.startswith("_") else text


def _over_steps(axes: Axes, curves: Sequence[Curve]) -> None:
    counts_rounds = any(curve.counts_rounds for curve in curves)
    _lines(axes, curves, lambda _, point: point.step)
    axes.set(xlabel="rounds" if counts_rounds else "local steps of each worker", title="Loss that the workers reported")


def _over_seconds(axes: Axes, curves: Sequence[Curve]) -> None:
    _lines(axes, curves, lambda curve, point: point.unix_time_s - began_at_s(curves, curve))
    axes.set(xlabel="seconds since the start")


def _over_bytes(axes: Axes, curves: Sequence[Curve]) -> None:
    _lines(axes, curves, lambda _, point: point.moved_bytes / 1e6, lambda curve: curve.has_server)
    axes.set(xlabel="MB that each worker has sent and received")


def _lines(
    axes: Axes,
    curves: Sequence[Curve],
    across: Callable[[Curve, Point], float],
    has_line: Callable[[Curve], bool] = lambda _: True,
) -> None:
    drawn = list[float]()
    for index, curve in enumerate(curves):
        if not has_line(curve):
            continue
        points, _ = thinned(curve.points, _MOST_POINTS)
        # Markers of different lines begin at different points, so that they do not hide each other; the end has one.
        every = max(1, -(-len(points) // _MARKS_A_LINE))
        axes.plot(
            [across(curve, point) for point in points],
            [point.loss for point in points],
            label=curve.title or label(curve.name),
            markevery=sorted({*range(index % every, len(points), every), len(points) - 1}),
            **look(index),
        )
        drawn += [point.loss for point in points if math.isfinite(point.loss)]
    axes.set_ylabel("loss")
    if is_wide(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if max(drawn) > _DECADES * min(drawn) else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
