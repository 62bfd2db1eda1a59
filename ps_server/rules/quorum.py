"""Whom a round waits for, and how long. Pure: the ledger says who takes part in the round, time is an argument."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, KeysView, Set
from dataclasses import dataclass, field

from ps_server.rules.policy import RoundPolicy

__all__ = ["Lateness", "MAX_NAMES", "Quorum"]

MAX_NAMES = 10_000
"""How many workers are remembered. Their names come from outside, and one that makes up new ones must not fill the
memory."""

# Until this many late pushes have been seen, the time of grace is the initial one.
_ENOUGH_OBSERVATIONS = 5
_INITIAL_GRACE_S = 30.0
# Less than this is jitter, not lateness.
_LEAST_GRACE_S = 0.5


@dataclass
class Lateness:
    """By how many seconds recent pushes came after their round had enough."""

    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    def observe(self, late_s: Iterable[float]) -> None:
        """Notes how late the pushes of a round were."""
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
    """Which workers the rounds of a job expect, which have finished, and which the round in progress has given up.

    Strict: a round needs all workers that have not finished. With a quorum it needs `min_workers` and everyone it
    expects: a worker is expected from its first push of any kind until it leaves, finishes or misses a round. Once
    enough pushes are whole, the others have the time of grace; then they are barred from this round.

    ``present`` is always the workers that take part in the round in progress.

    Attributes:
        finished: workers that have finished their training; no round waits for them until they come back.
        enough_at_s: when the whole pushes of the round in progress became enough; None: they are not.
        barred_at_s: when the round in progress last barred somebody.
    """

    policy: RoundPolicy
    finished: frozenset[str] = frozenset()
    enough_at_s: float | None = field(default=None, init=False)
    barred_at_s: float = field(default=0.0, init=False)
    _expected: dict[str, bytes] = field(default_factory=dict, init=False)  # with the process that showed up
    _barred: set[str] = field(default_factory=set, init=False)
    _knows_workers: bool = field(default=False, init=False)  # whether `min_workers` will do besides the expected
    _lateness: Lateness = field(default_factory=Lateness, init=False)

    # Who comes and goes.

    def show_up(self, worker_id: str, incarnation: bytes) -> None:
        """A worker has pushed something, be it stale: later rounds with a quorum wait for it."""
        if self.policy.is_strict:
            return
        self._expected.pop(worker_id, None)
        self._expected[worker_id] = incarnation
        if len(self._expected) > MAX_NAMES:
            del self._expected[next(iter(self._expected))]

    def come_back(self, worker_id: str, present: KeysView[str]) -> None:
        """A worker is going to push. The first after the end of a job begins another one, in which nobody has
        finished."""
        self.finished = frozenset() if self.is_over(present) else self.finished - {worker_id}

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """A worker's process goes. That of an earlier process of the same name changes nothing."""
        if self._expected.get(worker_id) == incarnation:
            del self._expected[worker_id]

    def finish(self, worker_id: str) -> None:
        """A worker has finished its training."""
        if len(self.finished) < MAX_NAMES:
            self.finished |= {worker_id}
        self._expected.pop(worker_id, None)

    def give_up(self, worker_ids: Iterable[str]) -> None:
        """Rounds no longer wait for these, until they show up again."""
        for worker_id in worker_ids:
            self._expected.pop(worker_id, None)

    # What a round needs.

    def needed(self, present: KeysView[str]) -> int:
        """How many workers have to take part before the round can close."""
        return self._of_those_left(self.policy.min_workers if self._knows_workers else self.policy.num_workers, present)

    def enough(self, present: KeysView[str]) -> int:
        """How many pushes have to be whole before the time of grace begins."""
        return self._of_those_left(self.policy.min_workers, present)

    def is_complete(self, present: KeysView[str]) -> bool:
        """Whether the round waits for nobody else to take part."""
        all_there = self._expected.keys() - self._barred <= present
        full = len(present) >= self.policy.max_workers
        return len(present) >= self.needed(present) and (all_there or full)

    def absent(self, present: KeysView[str]) -> set[str]:
        """Workers that are expected in the round in progress, and do not take part yet."""
        return self._expected.keys() - self._barred - present

    def is_over(self, present: KeysView[str]) -> bool:
        """Whether all workers have finished."""
        return len(self.finished) >= self.policy.num_workers and not present and not self._expected

    def is_lost(self, worker_id: str) -> bool:
        """Whether the worker is known to be gone: if it is in the middle of its push, the rest never comes."""
        return worker_id in self.finished or not (self.policy.is_strict or worker_id in self._expected)

    def _of_those_left(self, workers: int, present: KeysView[str]) -> int:
        """This many, or as many as there are without those that have finished."""
        gone = len(self.finished - present) if self.finished else 0
        return min(workers, max(1, self.policy.num_workers - gone))

    # The time of grace.

    @property
    def grace_s(self) -> float:
        """How long the time of grace is, in seconds."""
        return self._lateness.grace_s if self.policy.grace_s is None else self.policy.grace_s

    def is_barred(self, worker_id: str) -> bool:
        """Whether the round in progress has given this worker up."""
        return worker_id in self._barred

    def bar_the_late(self, present: KeysView[str], whole: Set[str], held: Set[str], now_s: float) -> Set[str]:
        """The time of grace is over. Bars every worker that takes part or is expected and whose push is not whole,
        except those that are held. Returns whom it has barred."""
        late = ((self._expected.keys() - (self._barred | held)) | present) - whole
        self.give_up(late)
        self._barred |= late
        self.barred_at_s, self._knows_workers = now_s, True
        return late

    def bar_nobody(self) -> None:
        """The round in progress lets everyone in again."""
        self._barred.clear()

    def committed(self, late_s: Iterable[float]) -> None:
        """A round has committed, with pushes that became whole ``late_s`` seconds after there were enough."""
        self._lateness.observe(late_s)
        self._barred.clear()
        self._knows_workers = True
