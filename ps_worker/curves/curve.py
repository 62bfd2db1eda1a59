"""One worker's loss over its run, with what it took to get there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

__all__ = ["Curve", "Point", "began_at_s", "curve_of", "is_wide", "thinned"]

_WIDE = 8.0


@dataclass(frozen=True)
class Point:
    """Where a worker was when it had a loss.

    Args:
        step: its local steps; or rounds, if `Curve.counts_rounds`.
        unix_time_s: when.
        moved_bytes: bytes of fragments that it had sent and received.
        loss: NaN: it was not finite, or is unknown.
        session: of its process; steps and bytes of the next one begin again.
    """

    step: int
    unix_time_s: float
    moved_bytes: int
    loss: float
    session: str = ""


@dataclass(frozen=True)
class Curve:
    """The points of one worker in their order.

    Args:
        name: of the worker.
        points: at least one.
        began_at_s: when the worker began, in Unix time.
        has_server: False: it trained alone, for comparison, and has moved no bytes.
        counts_rounds: whether steps are rounds, because the worker told no local steps.
        title: what to call it in a picture; empty: its name.
    """

    name: str
    points: tuple[Point, ...]
    began_at_s: float
    has_server: bool = True
    counts_rounds: bool = False
    title: str = ""

    @property
    def last(self) -> Point:
        """The last point."""
        return self.points[-1]

    @property
    def last_loss(self) -> float:
        """The last loss that is finite; NaN: there is none."""
        return next((point.loss for point in reversed(self.points) if math.isfinite(point.loss)), math.nan)


def curve_of(
    name: str, points: Iterable[Point], began_at_s: float, has_server: bool = True, counts_rounds: bool = False
) -> Curve:
    """A curve whose steps and bytes never go back: a process that starts again adds to those before it.

    Its steps are added only if they begin again, too; a worker that restores its count goes on from there.
    """
    found = list[Point]()
    before = Point(0, began_at_s, 0, math.nan)
    steps = moved_bytes = 0  # of the processes before
    for point in points:
        if found and (point.session != before.session or point.moved_bytes < before.moved_bytes):
            moved_bytes += before.moved_bytes
            if point.step + steps <= found[-1].step:
                steps = found[-1].step
        before = point
        found.append(replace(point, step=point.step + steps, moved_bytes=point.moved_bytes + moved_bytes))
    return Curve(name, tuple(found), began_at_s, has_server, counts_rounds)


def began_at_s(curves: Sequence[Curve], curve: Curve) -> float:
    """When the clock of this curve began: for workers of one job, when the first of them did; alone, its own."""
    together = [each.began_at_s for each in curves if each.has_server]
    return min(together) if curve.has_server else curve.began_at_s


def is_wide(losses: Sequence[float]) -> bool:
    """Whether these finite losses need a logarithmic scale: all are above 0, and some are many times others."""
    return bool(losses) and min(losses) > 0 and max(losses) > _WIDE * min(losses)


def thinned(points: Sequence[Point], most: int) -> tuple[list[Point], int]:
    """At most about ``most`` points, each in place of that many neighbours: with the mean of their losses, and the last
    one's step, time and bytes. A group with a loss that is not finite is not finite.

    Returns:
        The points, and how many each stands for; 1: they are all there.
    """
    size = -(-len(points) // max(1, most))
    edges = [*range(0, len(points), size), len(points)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [replace(group[-1], loss=math.fsum(p.loss for p in group) / len(group)) for group in groups], size
