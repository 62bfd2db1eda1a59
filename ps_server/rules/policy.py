"""Whom a round waits for, and how long: configuration."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KeepingPolicy", "MAX_WORKERS", "RoundPolicy"]

MAX_WORKERS = 10_000
"""How many workers a round may have: their names, of 128 bytes each, fit into the message that lists them."""


@dataclass(frozen=True)
class RoundPolicy:
    """Whom a round waits for.

    Args:
        num_workers: how many distinct workers there are.
        min_workers: how many a round needs at least. `num_workers` (strict): it waits for all, however long it takes.
        max_workers: how many may take part in one round.
        grace_s: how long a round waits for the rest once `min_workers` pushes are whole; None: a time that adapts to
            how late pushes have been (`ps_server.rules.quorum.Lateness`).
        round_timeout_s: a worker that has waited for longer is told DEADLINE_EXCEEDED; its push stays. None: never.
    """

    num_workers: int
    min_workers: int
    max_workers: int
    grace_s: float | None = None
    round_timeout_s: float | None = None

    @classmethod
    def strict(cls, num_workers: int, round_timeout_s: float | None = None) -> RoundPolicy:
        """A round has one push of each of ``num_workers`` workers."""
        return cls(num_workers, num_workers, num_workers, round_timeout_s=round_timeout_s)

    @property
    def is_strict(self) -> bool:
        """Whether a round needs all workers."""
        return self.min_workers == self.num_workers


@dataclass(frozen=True)
class KeepingPolicy:
    """Which rounds are written to the disk before they are answered.

    Args:
        every_rounds: those that reach a multiple of this step.
        timeout_s: how long a round waits for that; then it is answered without, and the next ones do not wait until
            the disk has taken what it was given. None: as long as it takes.
    """

    every_rounds: int = 1
    timeout_s: float | None = None
