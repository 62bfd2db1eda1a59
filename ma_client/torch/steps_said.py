"""What a worker logs about its steps: whether they are in the center."""

from __future__ import annotations

import logging

from ma_client.session import ParameterServerSession
from modelaverage.logs import event
from modelaverage.outcome import Outcome

__all__ = ["say_discarded", "say_finished", "say_not_used"]

_log = logging.getLogger("ma_client")
_WHY = {
    Outcome.STALE: "STALE: the round was over",
    Outcome.ALREADY_COUNTED: "ALREADY_COUNTED: an earlier push of it is in the average",
}


def say_discarded(session: ParameterServerSession, steps: int) -> None:
    """The center has replaced local variables with steps in them that were in no round."""
    _log.warning(
        "%s of %s since its last round: discarded; its local variables are now those of the center (global_step %d). "
        "Steps reach the center when the hook ends without an exception, or by `average`",
        _steps(steps),
        session.worker_id,
        session.base_step or 0,
        extra=event("steps_discarded", worker=session.worker_id, round=session.base_step or 0, steps=steps),
    )


def say_not_used(session: ParameterServerSession, outcome: Outcome, steps: int) -> None:
    """A push came too late, or a second time."""
    _log.warning(
        "the push of %s was not used (%s): %s since its last round are lost; it continues from the center of "
        "global_step %d",
        session.worker_id,
        _WHY[outcome],
        _steps(steps),
        session.base_step or 0,
        extra=event("push_not_used", worker=session.worker_id, round=session.base_step or 0, steps=steps),
    )


def say_finished(session: ParameterServerSession, workers_training: int) -> None:
    """This worker has finished, and others are still training."""
    _log.info(
        "%s has finished at global_step %d; rounds go on with %s; its model stays as its last round left it",
        session.worker_id,
        session.base_step or 0,
        "1 worker" if workers_training == 1 else f"{workers_training} workers",
        extra=event(
            "training_finished",
            worker=session.worker_id,
            round=session.base_step or 0,
            workers_training=workers_training,
        ),
    )


def _steps(count: int) -> str:
    return "1 local step" if count == 1 else f"{count} local steps"
