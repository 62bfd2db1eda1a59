"""How a server that has fallen behind reaches the step of the others: one worker's decisions. Pure: no calls, no clock.

A server falls behind when it or a worker dies in the middle of a round. It then lacks rounds that other servers have,
and pushes repeat them. A worker that has the lost center restores it with RESTORE. A worker that has nothing to
contribute meets the barrier with ABSTAIN. A worker whose copy of the center is gone, but which has local variables made
from it, pushes those with CONTRIBUTE, one step earlier than they were made for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from modelaverage.errors import ConflictError, ModelAverageError, Reason
from modelaverage.purpose import Purpose

__all__ = ["Goal", "MakePush", "Move", "ServerView", "common_step", "decide", "goes_on_after", "is_behind"]


class Move(enum.Enum):
    """What a worker does next to bring a server to a step."""

    DONE = "the server has reached the step, and this worker has its center"
    ASK = "ask the server for its status"
    LOST = "the server has no center"
    PULL = "the server has reached the step; read its center"
    WAIT = "wait until other workers bring it there"


@dataclass(frozen=True)
class MakePush:
    """Make a push to the server.

    Args:
        purpose: the purpose of the push.
        base_step: the base step of the push.
    """

    purpose: Purpose
    base_step: int


@dataclass(frozen=True)
class Goal:
    """The step that a server must reach.

    Args:
        step: the least step.
        may_push: False: this worker only waits.
        has_local: whether this worker has local variables made from the center of ``step``.
    """

    step: int
    may_push: bool = True
    has_local: bool = False


@dataclass(frozen=True)
class ServerView:
    """What a worker knows of a server.

    Args:
        held: the step of the center that this worker has from it; None: it has none.
        is_intact: whether the bytes of that center are unchanged.
        is_lost: whether the server is known to have lost that center.
        step: the server's `global_step`; None: not asked yet.
        has_center: whether the server has a center.
        is_asked: whether the server's round seems to wait for this worker.
        waited_s: how long this worker has waited for the server.
        is_alone: whether the last push was refused because other workers push from an earlier step.
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
    """Decides what a worker does next.

    Args:
        view: what the worker knows of the server.
        goal: what it wants to reach.
        long_wait_s: after this time the worker pushes even if the round does not seem to wait for it: the server may
            name a reader in its place, and a needless push does no harm.
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
    """The step that all servers must reach, given the worker's centers from them; None: all have reached it."""
    target = max(step for step in held if step is not None)
    return None if all(step == target for step in held) else target


def goes_on_after(error: ModelAverageError) -> Reason | None:
    """The reason of a refusal after which the worker continues: BASE_STEP_AHEAD (others push from an earlier step) or
    ROUND_FULL (others make this round). None: any other error."""
    news = (Reason.BASE_STEP_AHEAD, Reason.ROUND_FULL)
    return error.reason if isinstance(error, ConflictError) and error.reason in news else None


def _push(purpose: Purpose, base_step: int, view: ServerView) -> MakePush:
    """Repeats all missing rounds at once, unless others push from an earlier step: then one by one with them."""
    assert view.step is not None
    return MakePush(purpose, view.step if view.is_alone else base_step)
