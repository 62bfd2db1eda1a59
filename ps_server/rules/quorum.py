"""Whom a round waits for, and how long. Pure: the ledger says who takes part in the round, time is an argument."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, KeysView, Set
from dataclasses import dataclass, field

from ps_server.rules.policy import RoundPolicy

__all__ = ["Lateness", "MAX_NAMES", "Quorum"]

MAX_NAMES = 10_000
"""How many workers are remembered. Names come from clients, and a client that invents names must not fill the memory.
"""

# Until this many late pushes have been seen, the grace period is the initial one.
_ENOUGH_OBSERVATIONS = 5
_INITIAL_GRACE_S = 30.0
# Less than this is jitter, not lateness.
_LEAST_GRACE_S = 0.5


@dataclass
class Lateness:
    """By how many seconds recent pushes came after their round had enough."""

    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    def observe(self, late_s: Iterable[float]) -> None:
        """Records how late the pushes of a round were."""
        self._recent_s.extend(late_s)

    @property
    def grace_s(self) -> float:
        """Median + 4 x median absolute deviation: long enough for nearly every push that is no later than usual."""
        if len(self._recent_s) < _ENOUGH_OBSERVATIONS:
            return _INITIAL_GRACE_S
        median_s = statistics.median(self._recent_s)
        deviation_s = statistics.median(abs(late_s - median_s) for late_s in self._recent_s)
        return max(_LEAST_GRACE_S, median_s + 4 * deviation_s)


@dataclass
class Quorum:
    """Which workers the rounds of a job expect, which have finished, and which the round in progress has barred.

    Strict: a round needs all workers that have not finished. With a quorum, a round needs `min_workers` workers and
    every worker that it expects. A worker is expected from its first push of any kind until it leaves, finishes or
    misses a round. Once enough pushes are whole, the grace period begins; after it, late workers are barred from this
    round.

    ``present`` is always the set of workers in the round in progress.

    Attributes:
        finished: workers that have finished their training; no round waits for them until they come back.
        enough_at_s: when enough pushes of the round in progress were whole; None: not yet.
        barred_at_s: when the round in progress last barred a worker.
    """

    policy: RoundPolicy
    finished: frozenset[str] = frozenset()
    enough_at_s: float | None = field(default=None, init=False)
    barred_at_s: float = field(default=0.0, init=False)
    _expected: dict[str, bytes] = field(default_factory=dict, init=False)  # by worker, the incarnation that pushed
    _barred: set[str] = field(default_factory=set, init=False)
    _knows_workers: bool = field(default=False, init=False)  # whether `min_workers` and the expected suffice
    _lateness: Lateness = field(default_factory=Lateness, init=False)

    # Workers that come and go.

    def show_up(self, worker_id: str, incarnation: bytes) -> None:
        """A worker has pushed, even if the push is stale: later rounds with a quorum wait for it."""
        if self.policy.is_strict:
            return
        self._expected.pop(worker_id, None)
        self._expected[worker_id] = incarnation
        if len(self._expected) > MAX_NAMES:
            del self._expected[next(iter(self._expected))]

    def come_back(self, worker_id: str, present: KeysView[str]) -> None:
        """A worker is about to push. If all workers had finished, this begins a new run, in which none has finished."""
        self.finished = frozenset() if self.is_over(present) else self.finished - {worker_id}

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """A worker's process leaves. Ignored if a later process of the same name has pushed."""
        if self._expected.get(worker_id) == incarnation:
            del self._expected[worker_id]

    def finish(self, worker_id: str) -> None:
        """A worker has finished its training."""
        if len(self.finished) < MAX_NAMES:
            self.finished |= {worker_id}
        self._expected.pop(worker_id, None)

    def give_up(self, worker_ids: Iterable[str]) -> None:
        """Rounds no longer wait for these workers until they push again."""
        for worker_id in worker_ids:
            self._expected.pop(worker_id, None)

    # What a round needs.

    def needed(self, present: KeysView[str]) -> int:
        """How many workers must take part before the round can close."""
        return self._of_those_left(self.policy.min_workers if self._knows_workers else self.policy.num_workers, present)

    def enough(self, present: KeysView[str]) -> int:
        """How many pushes must be whole before the grace period begins."""
        return self._of_those_left(self.policy.min_workers, present)

    def is_complete(self, present: KeysView[str]) -> bool:
        """Whether every worker that the round waits for takes part."""
        all_there = self._expected.keys() - self._barred <= present
        full = len(present) >= self.policy.max_workers
        return len(present) >= self.needed(present) and (all_there or full)

    def absent(self, present: KeysView[str]) -> set[str]:
        """Workers that the round in progress expects and that do not take part yet."""
        return self._expected.keys() - self._barred - present

    def is_over(self, present: KeysView[str]) -> bool:
        """Whether all workers have finished."""
        return len(self.finished) >= self.policy.num_workers and not present and not self._expected

    def is_lost(self, worker_id: str) -> bool:
        """Whether the worker is known to be gone, so that the rest of an unfinished push will never arrive."""
        return worker_id in self.finished or not (self.policy.is_strict or worker_id in self._expected)

    def _of_those_left(self, workers: int, present: KeysView[str]) -> int:
        """``workers``, but at most the number of workers that have not finished."""
        gone = len(self.finished - present) if self.finished else 0
        return min(workers, max(1, self.policy.num_workers - gone))

    # The grace period.

    @property
    def grace_s(self) -> float:
        """The length of the grace period, in seconds."""
        return self._lateness.grace_s if self.policy.grace_s is None else self.policy.grace_s

    @property
    def barred(self) -> frozenset[str]:
        """The workers that are barred from the round in progress."""
        return frozenset(self._barred)

    def is_barred(self, worker_id: str) -> bool:
        """Whether this worker is barred from the round in progress."""
        return worker_id in self._barred

    def bar_the_late(self, present: KeysView[str], whole: Set[str], held: Set[str], now_s: float) -> Set[str]:
        """The grace period is over. Bars every present or expected worker whose push is not whole, except the held
        ones. Returns the barred workers.
        """
        late = ((self._expected.keys() - (self._barred | held)) | present) - whole
        self.give_up(late)
        self._barred |= late
        self.barred_at_s, self._knows_workers = now_s, True
        return late

    def bar_nobody(self) -> None:
        """Bars no worker any more from the round in progress."""
        self._barred.clear()

    def committed(self, late_s: Iterable[float]) -> None:
        """A round has committed, with pushes that became whole ``late_s`` seconds after enough were whole."""
        self._lateness.observe(late_s)
        self._barred.clear()
        self._knows_workers = True
