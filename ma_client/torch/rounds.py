"""The parts of a round: collect the contribution, push it, install the average. A schedule says when each is done."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.job.results import PushResult
from ma_client.job.ticket import PushTicket
from ma_client.torch.nonfinite import NonfiniteGuard
from ma_client.torch.replica import Replica
from ma_client.torch.steps_said import say_not_used
from ma_client.torch.weighing import Weighing
from ma_client.values.reused import ReusedMemory
from modelaverage.errors import RetryPushError
from modelaverage.outcome import Outcome
from modelaverage.outer.base import summed_in

__all__ = ["OwnContribution", "Rounds", "moved"]


@dataclass(frozen=True)
class OwnContribution:
    """What a worker gives to one round.

    Args:
        values: the local variables by name; a snapshot, or what may be the tensors' own memory, as
            `LocalVariables.gather` says.
        untouched: names of those that hold the bytes of the center from which they started.
        base_step: the `global_step` of that center.
        steps: how many local steps since the last round the values have in them.
        steps_pushed_before: how many of these an earlier push had, the first since that round; None: there was none.
        local_step: this worker's count of steps.
        loss: to be shown in the servers' status; None: nothing.
        weight: share in the average.
        is_finite: False: the values are not finite and may not be pushed; this worker abstains.
    """

    values: Mapping[str, NDArray[np.generic]]
    untouched: frozenset[str]
    base_step: int | None
    steps: int
    steps_pushed_before: int | None
    local_step: int
    loss: float | None
    weight: float
    is_finite: bool


class Rounds:
    """Makes the parts of rounds, for one worker.

    Args:
        replica: the local variables and their session.
        interval_steps: told to the servers, which show it.
        weighing: the weight of contributions.
        guard: looks for values that are not finite.

    Attributes:
        replica: the same.
        loss: what the next contribution says of the loss.
        last: how the last push ended; None: there was none.
    """

    def __init__(self, replica: Replica, interval_steps: int, weighing: Weighing, guard: NonfiniteGuard) -> None:
        self.replica = replica
        self._interval_steps = interval_steps
        self._weighing = weighing
        self._guard = guard
        self._snapshots = ReusedMemory()
        self.loss: float | None = None
        self.last: PushResult | None = None

    def note_loss(self, loss: float | torch.Tensor | None) -> None:
        """Takes the loss that a closure returned. A tensor is read, which waits for its device. None: nothing new."""
        if loss is not None:
            self.loss = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def gather(self, snapshot: bool = False) -> OwnContribution:
        """What this worker has for a round now, and is about to push. ``snapshot``: as copies, which training does not
        change.

        Raises:
            ValueError: a parameter is trained that was frozen when the center was made.
            ConflictError: MANIFEST_MISMATCH: the model has changed and no longer fits the center.
            InvalidRequestError: WEIGHT_INVALID; or values are not finite, and that is an error.
        """
        variables, progress = self.replica.variables, self.replica.progress
        if self.last is None:  # again, because trainers wrap the model after the hook has begun
            variables.warn_if_gradients_are_shared()
        values: Mapping[str, NDArray[np.generic]] = variables.gather()
        if snapshot:
            values = self._snapshots.copies(values)
        late = progress.touched - values.keys()
        if late:
            raise ValueError(
                f"{min(late)!r} is trained, but was frozen when the center was made and is no center variable; "
                "leave it trainable until the hook has begun, and freeze it then"
            )
        session = self.replica.session
        untouched = self.replica.untouched(values)
        is_finite = self._guard.lets_push(values, untouched, session.worker_id, progress.local_step)
        weight = self._weighing.ask(session.worker_id)
        steps, before = progress.steps_since_round, progress.count_push()
        return OwnContribution(
            values, untouched, session.base_step, steps, before, progress.local_step, self.loss, weight, is_finite
        )

    def push(self, contribution: OwnContribution) -> PushResult:
        """Gives it to the average and waits for the round. The local variables are not changed.

        Raises:
            ModelAverageError: the round failed; see `ParameterServerSession.push_and_average`.
        """
        return self.replica.session.push_and_average(contribution.values, **self._about(contribution))

    def begin_push(self, contribution: OwnContribution) -> PushTicket:
        """Like `push`, but returns at once. The contribution must be a snapshot. Until the ticket is done, the session
        makes no other call."""
        return self.replica.session.begin_push(contribution.values, **self._about(contribution), snapshot=False)

    def _about(self, contribution: OwnContribution) -> dict[str, Any]:
        return {
            "weight": contribution.weight if contribution.is_finite else 0.0,
            "local_step": contribution.local_step,
            "loss": contribution.loss,
            "interval_steps": self._interval_steps,
            "untouched": contribution.untouched,
            "copy": False,
        }

    def install(self, result: PushResult, contribution: OwnContribution) -> None:
        """Replaces the local variables by the center that came back; warns of steps that are lost by that."""
        kept = self._kept(result, contribution)
        self.replica.install(_lent(result), kept, self.replica.progress.steps_since_round - contribution.steps)
        if not self._is_intact():
            self.replica.pull()
        self._end(result, contribution)

    def install_under(self, result: PushResult, contribution: OwnContribution) -> None:
        """Like `install`, but keeps what was trained since the contribution: the local variables become the center plus
        how far they have moved since. A worker that abstained because its values are not finite keeps nothing."""
        if not contribution.is_finite:
            self.replica.progress.steps_since_round = contribution.steps
            self.install(result, contribution)
            return
        kept, now = self._kept(result, contribution), self.replica.variables.gather()
        steps_later = self.replica.progress.steps_since_round - contribution.steps
        center = _under(now, result.center, contribution)
        if not self._is_intact():
            kept, now = frozenset(), {name: array.copy() for name, array in now.items()}
            self.replica.pull()
            center = _under(now, self.replica.variables.gather(), contribution)
        self.replica.install(center, kept, steps_later)
        self._end(result, contribution)

    def _kept(self, result: PushResult, contribution: OwnContribution) -> frozenset[str]:
        """Names of the variables that hold the new center already; warns if the push was not used."""
        if result.outcome is Outcome.COMMITTED:
            return result.untouched & contribution.untouched
        # What was pushed was not used, and says nothing about this center.
        self._say_what_is_lost(result, contribution)
        return frozenset()

    def _is_intact(self) -> bool:
        """False: a quorum went on, and wrote over the average before it was read."""
        try:
            self.replica.session.check_intact()
        except RetryPushError:
            return False
        return True

    def _end(self, result: PushResult, contribution: OwnContribution) -> None:
        """The round is over, and its center is installed."""
        self.last = result
        self._weighing.used(contribution.weight)
        if not contribution.is_finite:
            center, worker_id = self.replica.variables.gather(), self.replica.session.worker_id
            self._guard.abstained(center, contribution.untouched, worker_id)

    def _say_what_is_lost(self, result: PushResult, contribution: OwnContribution) -> None:
        """This push was not used. An earlier one from the same base step, which failed here, may be in the center: then
        only the steps after it are lost."""
        session, base_step = self.replica.session, contribution.base_step
        is_next = base_step is not None and result.global_step == base_step + 1
        was_counted = (is_next and session.worker_id in result.contributors) or (
            result.outcome is Outcome.ALREADY_COUNTED
        )
        counted = contribution.steps_pushed_before if was_counted else None
        if counted is None or contribution.steps > counted:
            say_not_used(session, result.outcome, contribution.steps - (counted or 0))


def _lent(result: PushResult) -> Mapping[str, NDArray[Any]]:
    """The center as the object that is the same in later rounds, unless the result has other arrays by now."""
    center, lent = result.center, result.lent
    if lent is None or list(center) != list(lent) or not all(map(operator.is_, center.values(), lent.values())):
        return center
    return lent


def _under(
    now: Mapping[str, NDArray[Any]], center: Mapping[str, NDArray[Any]], contribution: OwnContribution
) -> dict[str, NDArray[Any]]:
    """The center, moved as far as the local variables have since the contribution."""
    return {name: moved(center[name], contribution.values[name], values) for name, values in now.items()}


def moved(center: NDArray[Any], before: NDArray[Any], now: NDArray[Any]) -> NDArray[Any]:
    """``center`` plus the way from ``before`` to ``now``; exactly the center where nothing has moved."""
    exact = summed_in(center.dtype)
    with np.errstate(all="ignore"):
        back = np.subtract(before, now, dtype=exact)
        found: NDArray[Any] = np.subtract(center, back, dtype=exact)  # x - 0.0 is x, also for -0.0
        return found.astype(center.dtype, copy=False)
