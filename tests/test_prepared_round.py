"""A round whose pushes are all whole waits for `commit` or `abandon`; nothing that happens meanwhile changes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.errors import ModelAverageError, Reason
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Accumulate,
    Addition,
    Admit,
    CenterFollows,
    Decision,
    Dismiss,
    Hold,
    Prepare,
    Push,
    TimeOut,
)
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.round import Round
from tests.strategies import fast

POLICIES = (
    RoundPolicy.strict(2),
    RoundPolicy.strict(2, round_timeout_s=3.0),
    RoundPolicy(3, 2, 4, grace_s=1.0),
    RoundPolicy(3, 2, 3, grace_s=1.0, round_timeout_s=3.0),
)
COUNT = 2


def push(worker_id: str, process: int = 1, number: int = 1, step: int = 0) -> Push:
    return Push(worker_id, process.to_bytes(16, "big"), number, step)


def prepared(policy: RoundPolicy, base_step: int = 0) -> Round:
    """A round of a and b, on streams 1 and 2, that lacks only the commit."""
    round_ = Round(policy, COUNT)
    last = list[Decision]()
    for stream, worker_id in ((1, "a"), (2, "b")):
        round_.open(stream, push(worker_id, step=base_step), 0.0)
    for stream, index in itertools.product((1, 2), range(COUNT)):
        last = round_.take_fragments(stream, index, index + 1, 0.0)
    if not round_.prepared:  # a quorum waits for others
        assert round_.due_at_s is not None
        last = round_.expire(round_.due_at_s)
    assert last[-1] == Prepare(base_step + 1)
    return round_


EVENTS: dict[str, Callable[[Round, int, float], list[Decision]]] = {
    "a again": lambda round_, stream, now_s: round_.open(stream, push("a"), now_s),
    "a restarted": lambda round_, stream, now_s: round_.open(stream, push("a", process=2), now_s),
    "a from an earlier step": lambda round_, stream, now_s: round_.open(stream, push("a", process=2, step=1), now_s),
    "a newcomer": lambda round_, stream, now_s: round_.open(stream, push(f"n{stream}"), now_s),
    "a newcomer from ahead": lambda round_, stream, now_s: round_.open(stream, push(f"n{stream}", step=9), now_s),
    "a's stream ends": lambda round_, _, now_s: round_.close(1, now_s),
    "some stream ends": lambda round_, stream, now_s: round_.close(stream - 1, now_s),
    "a leaves": lambda round_, _, now_s: round_.leave("a", push("a").incarnation, now_s),
    "b leaves": lambda round_, _, now_s: round_.leave("b", push("b").incarnation, now_s),
    "time passes": lambda round_, _, now_s: round_.expire(now_s),
}


@fast
@given(st.sampled_from(POLICIES), st.sampled_from([0, 4]), st.lists(st.sampled_from(sorted(EVENTS)), max_size=30))
def test_nothing_that_happens_to_a_prepared_round_changes_what_it_commits(
    policy: RoundPolicy, base_step: int, events: list[str]
) -> None:
    round_ = prepared(policy, base_step)
    expected, now_s, open_streams = round_.as_committed(), 1.0, {1, 2}
    held, reasons = set[int](), set[Reason | None]()
    for stream, event in enumerate(events, start=10):
        now_s += 0.7
        try:
            decisions = EVENTS[event](round_, stream, now_s)
        except ModelAverageError as refused:
            reasons.add(refused.reason)
            continue
        for decision in decisions:
            match decision:
                case Admit(first_needed):
                    assert first_needed == COUNT
                    open_streams.add(stream)
                case Hold():
                    held.add(stream)
                case Dismiss(dismissed, error):
                    assert error.reason is Reason.PUSH_SUPERSEDED
                    open_streams.discard(dismissed)
                case TimeOut(streams):
                    open_streams -= set(streams)
                    held -= set(streams)
                case _:
                    raise AssertionError(f"{decision} in a prepared round")
        if event.endswith("ends"):
            ended = 1 if event.startswith("a's") else stream - 1
            open_streams.discard(ended)
            held.discard(ended)
        assert round_.prepared
        assert round_.global_step == 0
        assert round_.as_committed() == expected
    assert reasons <= {Reason.WORKER_ID_IN_USE, Reason.PUSH_SUPERSEDED}
    commit = round_.commit(now_s)
    assert (commit.global_step, commit.contributors) == (base_step + 1, ("a", "b"))
    assert set(commit.verdicts) == open_streams
    assert set(commit.held) == held
    assert (round_.global_step, round_.contributors, round_.counted) == expected
    assert not round_.prepared
    assert round_.open(1000, push("a", step=base_step), now_s) == [CenterFollows(Outcome.ALREADY_COUNTED)]


@fast
@given(st.sampled_from(POLICIES), st.lists(st.sampled_from(sorted(EVENTS)), max_size=10))
def test_an_abandoned_round_has_changed_nothing_and_commits_when_its_pushes_come_again(
    policy: RoundPolicy, events: list[str]
) -> None:
    round_, now_s = prepared(policy), 1.0
    for stream, event in enumerate(events, start=10):
        try:
            EVENTS[event](round_, stream, now_s)
        except ModelAverageError:
            continue
    round_.abandon()
    assert (round_.global_step, round_.contributors, round_.counted) == (0, (), {})
    assert not any(round_.holds(stream) for stream in range(100))
    assert not round_.under_way
    for stream, worker_id in ((101, "a"), (102, "b")):
        assert Admit(0) in round_.open(stream, push(worker_id, process=7), now_s)
    for stream, index in itertools.product((101, 102), range(COUNT)):
        accumulate = round_.take_fragments(stream, index, index + 1, now_s)[0]
        assert accumulate == Accumulate(index, 1.0, Addition.START if stream == 101 else Addition.ADD)
    if not round_.prepared:
        assert round_.due_at_s is not None
        round_.expire(round_.due_at_s)
    assert round_.commit(now_s).contributors == ("a", "b")
    assert round_.global_step == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_round_is_prepared_once(policy: RoundPolicy) -> None:
    round_ = prepared(policy)
    assert round_.close(1, 1.0) == []
    assert round_.open(3, push("a"), 1.0) == [Admit(COUNT)]
    assert not any(isinstance(decision, Prepare) for decision in round_.expire(1e6))


def test_a_commit_that_fails_leaves_the_step_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = prepared(RoundPolicy.strict(2))

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(round_, "_begin", out_of_memory)
    with pytest.raises(MemoryError):
        round_.commit(1.0)
    assert (round_.global_step, round_.contributors, round_.counted) == (0, (), {})
