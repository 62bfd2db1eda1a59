"""Rounds for examples. Workers are a, b, c; a push is `push("a", process=1, number=1)`."""

from __future__ import annotations

import pytest

from modelaverage.errors import ModelAverageError, Reason
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Accumulate, Admit, Commit, Dismiss, Push
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided

__all__ = ["commit_of", "dismissals", "give", "part", "push", "refused", "strict", "take", "whole"]


def push(
    worker_id: str,
    process: int = 1,
    number: int = 1,
    step: int = 0,
    weight: float = 1.0,
    untouched: tuple[int, ...] = (),
    purpose: Purpose = Purpose.CONTRIBUTE,
) -> Push:
    return Push(worker_id, process.to_bytes(16, "big"), number, step, weight, frozenset(untouched), purpose)


def strict(num_workers: int, fragment_count: int, global_step: int = 0) -> Round:
    return Round(RoundPolicy.strict(num_workers), fragment_count, global_step)


def give(round_: Round, stream: int, *indexes: int, now_s: float = 0.0) -> list[Decided]:
    decisions: list[Decided] = []
    for index in indexes:
        decisions += round_.take_fragments(stream, index, index + 1, now_s)
    return [decision for decision in decisions if not isinstance(decision, Accumulate)]


def take(round_: Round, stream: int, index: int) -> Accumulate:
    """Gives one fragment; other tests check what it leads to."""
    accumulate = round_.take_fragments(stream, index, index + 1, 0.0)[0]
    assert isinstance(accumulate, Accumulate)
    return accumulate


def commit_of(decisions: list[Decided]) -> Commit:
    return next(decision for decision in decisions if isinstance(decision, Commit))


def dismissals(decisions: list[Decided]) -> dict[int, Reason | None]:
    return {decision.stream: decision.error.reason for decision in decisions if isinstance(decision, Dismiss)}


def refused(error: pytest.ExceptionInfo[ModelAverageError]) -> Reason | None:
    return error.value.reason


def whole(round_: Round, stream: int, worker_id: str, *, step: int = 1, now_s: float) -> list[Decided]:
    """A whole push."""
    decisions = round_.open(stream, push(worker_id, number=step + 1, step=step), now_s)
    admit = next((decision for decision in decisions if isinstance(decision, Admit)), None)
    if admit is None:
        return decisions
    indexes = range(admit.first_needed, round_.fragment_count)
    return decisions + give(round_, stream, *indexes, now_s=now_s)


def part(round_: Round, stream: int, worker_id: str, *, step: int = 1, now_s: float) -> list[Decided]:
    """A push of which one of two fragments has come."""
    return round_.open(stream, push(worker_id, number=step + 1, step=step), now_s) + give(
        round_, stream, 0, now_s=now_s
    )
