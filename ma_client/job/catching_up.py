"""Brings one server to a step: a loop that carries out the decisions of `recovery.py`."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from ma_client.job.one_server import LocalPart, OneServer
from ma_client.job.recovery import Goal, MakePush, Move, ServerView, decide, goes_on_after, is_behind
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    ModelAverageError,
    Reason,
    ServerUnavailableError,
)
from modelaverage.logs import event
from modelaverage.missing import Missing
from modelaverage.purpose import Purpose
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["catch_up", "has_fallen_back", "push_again"]

_log = logging.getLogger("ma_client")
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_LOOK_TIMEOUT_S = 2.0


def push_again(server: OneServer, base_step: int, local: LocalPart, copy: bool, deadline: Deadline) -> pb.PushOutcome:
    """Pushes one round to a server, or abstains if the weight is 0, and repeats if the server has lost rounds that this
    worker has seen. Unless all workers agree to drop those rounds, the server first gets back the center from which
    this worker started. If that center is gone, too, the local variables made from it take its place, and none of them
    counts as untouched."""
    purpose = local.purpose
    while True:
        try:
            return server.push(base_step, local, copy, deadline, purpose)
        except ConflictError as error:
            if goes_on_after(error) is not Reason.BASE_STEP_AHEAD:
                raise
        if not server.has_center(is_private=False):
            local = replace(local, untouched=())
        goal = Goal(base_step, has_local=purpose is Purpose.CONTRIBUTE)
        catch_up(server, goal, copy, deadline, local, is_lost=True)


def has_fallen_back(server: OneServer) -> bool:
    """Whether the server's step is earlier than that of the center that this worker has from it."""
    try:
        status = server.connection.status(Deadline(_LOOK_TIMEOUT_S))
    except (ServerUnavailableError, DeadlineExceededError):
        return False  # unknown; the caller asks again later
    return is_behind(server.step, status.global_step)


def catch_up(
    server: OneServer,
    goal: Goal,
    copy: bool,
    deadline: Deadline,
    local: LocalPart | None = None,
    is_lost: bool = False,
    is_private: bool = False,
) -> None:
    """Returns once this worker has a center of the goal's step or later from the server.

    Args:
        server: the server.
        goal: the step to reach.
        copy: whether a center in shared memory is copied at once.
        deadline: for the whole call.
        local: local variables that were made from the center of the goal's step.
        is_lost: whether the server has lost the center that this worker has from it.
        is_private: whether no other code holds that center, so that copies of it are unchanged.
    """
    wait = _Wait(server, goal, deadline)
    status = pb.GetStatusResponse()
    center: LocalPart | None = None  # the center to restore; read once, because a failed push overwrites it
    view = ServerView(server.step, server.has_center(is_private), is_lost)
    while True:
        match decide(view, goal, server.connection.timing.long_wait_s):
            case Move.DONE:
                return
            case Move.ASK:
                status = server.status(deadline)
                view = _seen(view, status, server.worker_id, wait.lasted_s)
            case Move.LOST:
                raise server.lost("it has no center")
            case Move.PULL:
                server.pull(False, deadline)
                view, center = ServerView(server.step), None
            case Move.WAIT:
                wait.go_on(status)
                view = replace(view, step=None)
            case MakePush(purpose, base_step):
                if purpose is Purpose.RESTORE and center is None:
                    center = server.center_again(is_private)
                if purpose is Purpose.RESTORE and center is None:  # overwritten meanwhile
                    view = replace(view, is_intact=False)
                    continue
                gives = {Purpose.RESTORE: center, Purpose.CONTRIBUTE: local, Purpose.ABSTAIN: None}[purpose]
                try:
                    server.push(base_step, gives, copy, deadline, purpose)
                except ConflictError as error:
                    reason = goes_on_after(error)
                    if reason is None:
                        raise
                    view = replace(view, step=None, is_alone=reason is Reason.BASE_STEP_AHEAD)
                    if reason is Reason.ROUND_FULL:
                        wait.go_on(status)
                else:
                    if is_behind(view.held, server.step or 0):  # one of several steps is done
                        view = replace(view, step=None, is_lost=True, is_alone=False)
                    else:
                        view, center = ServerView(server.step), None


class _Wait:
    """Waits, with log lines, until other workers bring a server to a step."""

    def __init__(self, server: OneServer, goal: Goal, deadline: Deadline) -> None:
        self._server, self._goal, self._deadline = server, goal, deadline
        self._since_s = time.monotonic()
        self._pause_s, self._notice_s = _FIRST_PAUSE_S, server.connection.timing.first_notice_s

    @property
    def lasted_s(self) -> float:
        """How long the wait has lasted."""
        return time.monotonic() - self._since_s

    def go_on(self, status: pb.GetStatusResponse) -> None:
        """Waits a little; ``status`` is the server's latest status.

        Raises:
            DeadlineExceededError: the wait took too long.
            ModelAverageError: the session ended the wait.
        """
        connection = self._server.connection
        if self.lasted_s >= self._notice_s:
            self._notice_s *= 2
            _say_behind(connection.address, self._goal, status)
        if self._deadline.is_over:
            raise DeadlineExceededError(
                f"the parameter server at {connection.address} is at step {status.global_step}, another at "
                f"{self._goal.step}: waited {self._deadline.timeout_s:g} s"
            )
        if connection.stopped.wait(self._pause_s):
            raise ModelAverageError(f"the wait for {connection.address} was cancelled here")
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _seen(view: ServerView, status: pb.GetStatusResponse, worker_id: str, waited_s: float) -> ServerView:
    """The view, updated from the server's status."""
    at_rest = status.phase == pb.PHASE_IDLE
    perhaps = status.waiting_for_unknown > 0 or status.waiting_for_omitted > 0
    return replace(
        view,
        step=status.global_step,
        has_center=status.phase != pb.PHASE_UNINITIALIZED,
        is_asked=at_rest or perhaps or worker_id in status.waiting_for,
        waited_s=waited_s,
    )


def _say_behind(address: str, goal: Goal, status: pb.GetStatusResponse) -> None:
    missing = Missing.told(status)
    _log.warning(
        "the parameter server at %s is at step %d, another at %d; it has waited %.0f s for %s",
        address,
        status.global_step,
        goal.step,
        status.round_age_s,
        missing.text() if missing else "nobody yet",
        extra=event(
            "server_behind",
            peer=address,
            round=status.global_step,
            other_round=goal.step,
            waited_s=status.round_age_s,
            waiting_for=missing.names,
        ),
    )
