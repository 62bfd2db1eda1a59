"""How a server that has fallen behind comes to the step of the others: one worker's decisions. Pure: no calls, no
clock.

A server falls behind when it, or a worker, dies in the middle of a round: it lacks rounds that others know of, and
pushes make them again. A worker that has the center that the server has lost gives it back with RESTORE. One that has
nothing to give meets the barrier with ABSTAIN. One whose center is gone, and that has local variables made from it,
gives those with CONTRIBUTE, one step earlier than they were made for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from modelaverage.errors import ConflictError, ModelAverageError, Reason
from modelaverage.purpose import Purpose

__all__ = ["Goal", "MakePush", "Move", "ServerView", "common_step", "decide", "goes_on_after", "is_behind"]


class Move(enum.Enum):
    """What a worker does next at a server that is to come to a step."""

    DONE = "it is there, and this worker has its center"
    ASK = "its status has to be known"
    LOST = "it has no center at all"
    PULL = "it is there; its center is read"
    WAIT = "others bring it there"


@dataclass(frozen=True)
class MakePush:
    """A push to it is made.

    Args:
        purpose: of the push.
        base_step: of the push.
    """

    purpose: Purpose
    base_step: int


@dataclass(frozen=True)
class Goal:
    """Where a server has to come to.

    Args:
        step: at least.
        may_push: False: this worker only waits.
        has_local: whether this worker has local variables that it made from the center of ``step``.
    """

    step: int
    may_push: bool = True
    has_local: bool = False


@dataclass(frozen=True)
class ServerView:
    """What a worker knows of a server.

    Args:
        held: the step of the center that this worker has from it; None: it has none.
        is_intact: whether the bytes of that center are still as they came.
        is_lost: whether the server has lost that center, as far as is known.
        step: the server's `global_step`; None: it was not asked yet.
        has_center: whether the server has one.
        is_asked: whether its round seems to wait for this worker.
        waited_s: how long this worker has waited for it.
        is_alone: whether the last push was refused because others push from an earlier step.
    """

    held: int | None
    is_intact: bool = True
    is_lost: bool = False
    step: int | None = None
    has_center: bool = True
    is_asked: bool = False
    waited_s: float = 0.0
    is_alone: bool = False


def decide(view: ServerView, goal: Goal, long_wait_s: float) -> Move | MakePush:
    """What a worker does next.

    Args:
        view: what it knows.
        goal: what it wants.
        long_wait_s: after this time it pushes, asked or not: the server may take somebody who only reads for the worker
            that it waits for, and a push too many does no harm.
    """
    if view.held is not None and view.held >= goal.step and not view.is_lost:
        return Move.DONE
    if view.step is None:
        return Move.ASK
    if not view.has_center:
        return Move.LOST
    if view.step >= goal.step:
        return Move.PULL
    if not goal.may_push or not (view.is_asked or view.waited_s > long_wait_s):
        return Move.WAIT
    if view.held is not None and view.held > view.step:
        if view.is_intact:
            return _push(Purpose.RESTORE, view.held - 1, view)
        if goal.has_local:
            return _push(Purpose.CONTRIBUTE, goal.step - 1, view)
    return _push(Purpose.ABSTAIN, goal.step - 1, view)


def is_behind(held: int | None, step: int) -> bool:
    """Whether a server at this step has lost the center that a worker holds from it."""
    return held is not None and step < held


def common_step(held: Sequence[int | None]) -> int | None:
    """The step that all servers have to come to, by the centers that a worker has from them; None: all have it."""
    target = max(step for step in held if step is not None)
    return None if all(step == target for step in held) else target


def goes_on_after(error: ModelAverageError) -> Reason | None:
    """The reason of a refusal that ends nothing: BASE_STEP_AHEAD, others push from an earlier step; ROUND_FULL, others
    make this round. None: any other fault."""
    news = (Reason.BASE_STEP_AHEAD, Reason.ROUND_FULL)
    return error.reason if isinstance(error, ConflictError) and error.reason in news else None


def _push(purpose: Purpose, base_step: int, view: ServerView) -> MakePush:
    """Makes all missing rounds at once, unless others push from an earlier step: then one by one, with them."""
    assert view.step is not None
    return MakePush(purpose, view.step if view.is_alone else base_step)
