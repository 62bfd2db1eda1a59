"""Configuration: which workers a round waits for, and how long."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KeepingPolicy", "MAX_WORKERS", "RoundPolicy"]

MAX_WORKERS = 10_000
"""The most workers in a round. Their names, of up to 128 bytes each, fit into the message that lists them."""


@dataclass(frozen=True)
class RoundPolicy:
    """Which workers a round waits for.

    Args:
        num_workers: how many distinct workers there are.
        min_workers: how many workers a round needs at least. `num_workers` (strict): it waits for all, without limit.
        max_workers: how many workers may take part in one round.
        grace_s: how long a round waits for the rest once `min_workers` pushes are whole; None: the wait adapts to how
            late recent pushes were (`ps_server.rules.quorum.Lateness`).
        round_timeout_s: a worker that has waited longer gets DEADLINE_EXCEEDED; its push stays. None: no timeout.
    """

    num_workers: int
    min_workers: int
    max_workers: int
    grace_s: float | None = None
    round_timeout_s: float | None = None

    @classmethod
    def strict(cls, num_workers: int, round_timeout_s: float | None = None) -> RoundPolicy:
        """The policy of a round that needs a push of each of ``num_workers`` workers."""
        return cls(num_workers, num_workers, num_workers, round_timeout_s=round_timeout_s)

    @property
    def is_strict(self) -> bool:
        """Whether a round needs all workers."""
        return self.min_workers == self.num_workers


@dataclass(frozen=True)
class KeepingPolicy:
    """Which rounds are written to disk before they are answered.

    Args:
        every_rounds: the rounds that reach a multiple of this step.
        timeout_s: how long a round waits for its write. Then it is answered without the write, and later rounds do not
            wait until the disk has finished all earlier writes. None: no limit.
    """

    every_rounds: int = 1
    timeout_s: float | None = None
