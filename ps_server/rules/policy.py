"""For whom a round waits, and how long: configuration, and the time of grace that adapts to the workers."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Lateness", "MAX_WORKERS", "RoundPolicy"]

MAX_WORKERS = 10_000
"""How many workers a round may have: their names, of 128 bytes each, fit the message that tells who was counted."""

# Until so many late pushes have been seen, the time of grace is the initial one.
_ENOUGH_OBSERVATIONS = 5
_INITIAL_GRACE_S = 30.0
# Less than this is jitter, not lateness.
_LEAST_GRACE_S = 0.5


@dataclass(frozen=True)
class RoundPolicy:
    """For whom a round waits.

    Args:
        num_workers: how many distinct workers there are.
        min_workers: how many a round needs at least. `num_workers` (strict): it waits for all, however long it takes.
        max_workers: how many may stand in one round.
        grace_s: how long a round waits for the rest once `min_workers` pushes are whole; None: as long as they have
            been late of late (`Lateness`).
        round_timeout_s: a worker that has waited for longer is told DEADLINE_EXCEEDED; its push stays. None: never.
    """

    num_workers: int
    min_workers: int
    max_workers: int
    grace_s: float | None = None
    round_timeout_s: float | None = None

    @classmethod
    def strict(cls, num_workers: int, round_timeout_s: float | None = None) -> RoundPolicy:
        """A round is one push of each of so many workers."""
        return cls(num_workers, num_workers, num_workers, round_timeout_s=round_timeout_s)

    @property
    def is_strict(self) -> bool:
        """Whether a round needs all workers."""
        return self.min_workers == self.num_workers


@dataclass
class Lateness:
    """By how many seconds recent pushes came after their round had its quorum."""

    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    def observe(self, late_s: Iterable[float]) -> None:
        """Notes how late the pushes of a round were."""
        self._recent_s.extend(late_s)

    @property
    def grace_s(self) -> float:
        """Median + 4 x median absolute deviation: nearly all who are as late as they use to be are waited for."""
        if len(self._recent_s) < _ENOUGH_OBSERVATIONS:
            return _INITIAL_GRACE_S
        median_s = statistics.median(self._recent_s)
        deviation_s = statistics.median(abs(late_s - median_s) for late_s in self._recent_s)
        return max(_LEAST_GRACE_S, median_s + 4 * deviation_s)
