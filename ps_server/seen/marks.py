"""Single events in the life of a run, for its timeline. Pure."""

from __future__ import annotations

import enum
import heapq
from collections import deque
from typing import NamedTuple

__all__ = ["MAX_MARKS_A_KIND", "Mark", "MarkKind", "Marks"]

MAX_MARKS_A_KIND = 200
"""The newest marks of each kind are kept. Frequent ones, such as checkpoints, do not displace rare ones."""


class MarkKind(enum.Enum):
    """What happened."""

    RESTORED = "restored"
    """The server began from a checkpoint."""
    RESTARTED = "restarted"
    """A new process of the worker has pushed."""
    STALE = "stale"
    """A push of the worker came too late for its round."""
    LEFT = "left"
    """The worker's process ended without having finished."""
    FINISHED = "finished"
    """The worker has finished its training."""
    STARTED_OVER = "started_over"
    """The round started over."""
    CHECKPOINT = "checkpoint"
    """A checkpoint was written."""


class Mark(NamedTuple):
    """One event.

    Args:
        number: counts all marks from 1.
        kind: what happened.
        at_s: when, on the server's clock.
        step: the `global_step` at that time; of a checkpoint, its own.
        worker_id: whom it concerns; None: the whole round.
    """

    number: int
    kind: MarkKind
    at_s: float
    step: int
    worker_id: str | None


class Marks:
    """The newest marks of each kind."""

    def __init__(self) -> None:
        self._number = 0
        self._by_kind = {kind: deque[Mark](maxlen=MAX_MARKS_A_KIND) for kind in MarkKind}

    def add(self, kind: MarkKind, step: int, at_s: float, worker_id: str | None) -> None:
        """Adds one."""
        self._number += 1
        self._by_kind[kind].append(Mark(self._number, kind, at_s, step, worker_id))

    def in_order(self) -> tuple[Mark, ...]:
        """All of them, in the order of events."""
        return tuple(heapq.merge(*self._by_kind.values(), key=lambda mark: mark.number))
