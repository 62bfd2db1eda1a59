"""A past round, or several that are joined. Pure values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from ps_server.seen.traffic import Moved

__all__ = ["Losses", "NO_LOSSES", "PastPush", "PastRound"]


class Losses(NamedTuple):
    """The losses that workers reported with their pushes, summed up.

    Args:
        told: how many reported one.
        total: their sum; not finite if one of them is not.
        least: the lowest; NaN only if all are.
        most: the highest; NaN only if all are.
    """

    told: int = 0
    total: float = 0.0
    least: float = math.nan
    most: float = math.nan

    @classmethod
    def of(cls, losses: Iterable[float]) -> Losses:
        """Sums up losses."""
        reported = list(losses)
        if not reported:
            return NO_LOSSES
        numbers = [loss for loss in reported if not math.isnan(loss)] or reported
        return cls(len(reported), sum(reported), min(numbers), max(numbers))

    def joined(self, other: Losses) -> Losses:
        """Sums up both."""
        # min and max return their first argument if the second is NaN.
        least = other.least if math.isnan(self.least) else min(self.least, other.least)
        most = other.most if math.isnan(self.most) else max(self.most, other.most)
        return Losses(self.told + other.told, self.total + other.total, least, most)


NO_LOSSES = Losses()
"""No worker reported one."""


class PastPush(NamedTuple):
    """A worker's push in one round. Times are in seconds since the round began.

    Args:
        worker_id: of the worker.
        pushed_s: when its push was admitted.
        whole_s: when the last fragment of it had arrived.
        loss: that it reported; None: none.
        local_step: that it reported.
        nonfinite_values: how many of the values that it pushed were not finite.
    """

    worker_id: str
    pushed_s: float
    whole_s: float
    loss: float | None
    local_step: int
    nonfinite_values: int


class PastRound(NamedTuple):
    """One or several rounds. Durations are sums over them, in seconds.

    Args:
        step: the `global_step` that the first of them started from.
        last_step: the one that the last of them started from.
        rounds: how many they are.
        began_at_s: when the first push of the first was admitted, on the server's clock.
        committed_at_s: when the last committed.
        took_s: from the first push to the commit.
        waiting_s: of that, waiting for pushes.
        receiving_s: of that, receiving fragments.
        averaging_s: of that, averaging.
        moved: the bytes of fragments since the round before.
        losses: that workers reported.
        nonfinite_values: how many pushed values were not finite.
        has_detail: whether this is one round with its workers, which the following describe.
        pushes: of the workers, by name.
        pushes_omitted: how many more there were.
        without: the workers that the round gave up.
        without_omitted: how many more it gave up.
    """

    step: int
    last_step: int
    rounds: int
    began_at_s: float
    committed_at_s: float
    took_s: float
    waiting_s: float
    receiving_s: float
    averaging_s: float
    moved: Moved
    losses: Losses
    nonfinite_values: int
    has_detail: bool = False
    pushes: tuple[PastPush, ...] = ()
    pushes_omitted: int = 0
    without: tuple[str, ...] = ()
    without_omitted: int = 0

    def without_detail(self) -> PastRound:
        """The same without its workers."""
        return self._replace(has_detail=False, pushes=(), pushes_omitted=0, without=(), without_omitted=0)

    def joined(self, later: PastRound) -> PastRound:
        """These rounds and those that follow, as one entry."""
        return PastRound(
            step=self.step,
            last_step=later.last_step,
            rounds=self.rounds + later.rounds,
            began_at_s=self.began_at_s,
            committed_at_s=later.committed_at_s,
            took_s=self.took_s + later.took_s,
            waiting_s=self.waiting_s + later.waiting_s,
            receiving_s=self.receiving_s + later.receiving_s,
            averaging_s=self.averaging_s + later.averaging_s,
            moved=self.moved.plus(later.moved),
            losses=self.losses.joined(later.losses),
            nonfinite_values=self.nonfinite_values + later.nonfinite_values,
        )
