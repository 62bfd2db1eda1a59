"""Curves of the built-in workload, from its events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ps_worker.curves.curve import Curve, Point, curve_of
from ps_worker.events.parse import Event, StepEvent

__all__ = ["curves_of"]


def curves_of(events: Iterable[Event]) -> list[Curve]:
    """A curve for each worker: those with a server by name, then those that have moved no bytes, because they trained
    alone."""
    steps = defaultdict[str, list[StepEvent]](list)
    for event in events:
        if isinstance(event, StepEvent):
            steps[event.worker].append(event)
    curves = [_curve(name, found) for name, found in steps.items()]
    return sorted(curves, key=lambda curve: (not curve.has_server, curve.name))


def _curve(name: str, events: list[StepEvent]) -> Curve:
    points = [Point(event.step, event.unix_time_s, event.moved_bytes, event.loss) for event in events]
    return curve_of(name, points, events[0].unix_time_s, has_server=any(event.moved_bytes for event in events))
