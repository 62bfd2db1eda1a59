"""Curves as text, for a terminal: plain ASCII, without colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelaverage.commands.columns import fitted, padded, shortened, width
from modelaverage.names import shown
from ps_worker.curves.curve import Curve, Point, began_at_s, is_wide, thinned

__all__ = ["plotted"]

_ROWS = 12
_LEAST_COLUMNS, _MOST_COLUMNS = 40, 100
_NAME_COLUMNS = 20
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"
_SEVERAL, _OTHER = "*", "+"
_LABEL = 8  # columns left of the plot


def plotted(curves: Sequence[Curve], columns: int) -> list[str]:
    """The lines of a plot: loss over steps, with the seconds and megabytes that the steps took.

    Args:
        curves: of the workers.
        columns: of the terminal.

    Returns:
        No line contains more than ``columns`` (at least 40). Empty if no loss is finite.
    """
    cells = max(_LEAST_COLUMNS, min(columns, _MOST_COLUMNS)) - _LABEL - 2
    losses = [point.loss for curve in curves for point in curve.points if math.isfinite(point.loss)]
    if not losses:
        return []
    last = max(curve.last.step for curve in curves)
    first = min(curve.points[0].step for curve in curves)
    across = _Scale(first if 2 * first > last else 0, last, cells)
    shown_points = [_by_column(curve, across) for curve in curves]
    finite = [point.loss for points in shown_points for point in points.values() if math.isfinite(point.loss)]
    up = _Scale(min(finite, default=min(losses)), max(finite, default=max(losses)), _ROWS, is_wide(losses))
    rows = [[" "] * cells for _ in range(_ROWS)]
    for index, points in enumerate(shown_points):
        for column, point in points.items():
            if math.isfinite(point.loss):
                row = rows[_ROWS - 1 - up.at(point.loss)]
                row[column] = _mark(index) if row[column] == " " else _SEVERAL
    labelled = {0: up.value(_ROWS - 1), _ROWS // 2: up.value(_ROWS - 1 - _ROWS // 2), _ROWS - 1: up.value(0)}
    lines = [_title(up.is_log, cells + _LABEL + 2)]
    lines += [
        f"{_number(labelled[row]) if row in labelled else '':>{_LABEL}} |{''.join(marks)}".rstrip()
        for row, marks in enumerate(rows)
    ]
    return [*lines, *_axes(curves, across, cells), *_legend(curves, cells + _LABEL + 2)]


class _Scale:
    """Places values in cells.

    Args:
        low: the value of the first cell.
        high: of the last one.
        cells: how many there are.
        is_log: whether equal ratios are equally far apart.
    """

    def __init__(self, low: float, high: float, cells: int, is_log: bool = False) -> None:
        self.is_log = is_log
        self._low, self._high = (math.log(low), math.log(high)) if is_log else (low, high)
        self._last = cells - 1

    def at(self, value: float) -> int:
        """The cell of a value."""
        found = math.log(value) if self.is_log else value
        span = self._high - self._low
        return 0 if span <= 0 else round((found - self._low) / span * self._last)

    def value(self, cell: float) -> float:
        """The value in the middle of a cell."""
        found = self._low + (self._high - self._low) * cell / self._last
        return math.exp(found) if self.is_log else found


def _by_column(curve: Curve, across: _Scale) -> dict[int, Point]:
    """What to draw in each column: the mean of the points that fall there."""
    columns: dict[int, list[Point]] = {}
    for point in curve.points:
        columns.setdefault(across.at(point.step), []).append(point)
    return {column: thinned(points, 1)[0][0] for column, points in columns.items()}


def _axes(curves: Sequence[Curve], across: _Scale, cells: int) -> list[str]:
    """The horizontal axis, and what its ticks are worth in steps, seconds and megabytes."""
    steps = [across.value(0), across.value((cells - 1) / 2), across.value(cells - 1)]
    ticks = (0, across.at(steps[1]), cells - 1)
    together = [curve for curve in curves if curve.has_server]
    longest = max(together or curves, key=lambda curve: curve.last.step)
    began_s = began_at_s(curves, longest)
    reached = [next((p for p in longest.points if p.step >= step), longest.last) for step in steps]
    is_start = [step == 0 for step in steps]
    seconds = [0.0 if begins else p.unix_time_s - began_s for p, begins in zip(reached, is_start, strict=True)]
    megabytes = [0.0 if begins else p.moved_bytes / 1e6 for p, begins in zip(reached, is_start, strict=True)]
    axis = "".join("+" if column in ticks else "-" for column in range(cells))
    lines = [f"{'':>{_LABEL}} +{axis}"]
    names = ("rounds" if longest.counts_rounds else "steps", "seconds", "MB")
    for name, values in zip(names, (steps, seconds, megabytes), strict=True):
        line = padded(f"{name:>{_LABEL}}", _LABEL + 2)
        for tick, value in zip(ticks, values, strict=True):
            text = f"{value:.0f}" if name == names[0] else _number(value)
            at = _LABEL + 2 + (tick - len(text) + 1 if tick == cells - 1 else tick)
            line = padded(line, at) + text
        lines.append(line)
    return lines


def _title(is_log: bool, columns: int) -> str:
    scale = " (logarithmic)" if is_log else ""
    return fitted([f"Loss as reported{scale}", "MB: what one worker has sent and received"], columns, "; ")


def _legend(curves: Sequence[Curve], columns: int) -> list[str]:
    """Each worker's mark and its last loss."""
    parts = [f"{_mark(i)} {_named(curve)} {_number(curve.last_loss)}" for i, curve in enumerate(curves)]
    if len(curves) > 1:
        parts.append(f"{_SEVERAL} several of them")
    lines = [""]
    for index, part in enumerate(parts):
        longer = f"{lines[-1]}   {part}" if lines[-1] else f"{'at end':>{_LABEL}}  {part}" if index == 0 else part
        if width(longer) <= columns or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == 4:
            return [*lines[:-1], f"{'':{_LABEL}}  and {len(parts) - index:,} more"]
        else:
            lines.append(f"{'':{_LABEL}}  {part}")
    return lines


def _named(curve: Curve) -> str:
    return shortened(shown(curve.name), _NAME_COLUMNS)


def _mark(index: int) -> str:
    return _MARKS[index] if index < len(_MARKS) else _OTHER


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"
