"""When a round waits for its checkpoint: by examples, and over random interleavings against an oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_server.rules.decisions import Decision, KeepFirst, Prepare
from ps_server.rules.keeping import Keeping
from ps_server.rules.policy import KeepingPolicy, RoundPolicy
from ps_server.rules.round import Round
from tests.rounds import push
from tests.strategies import thorough


def test_without_checkpoints_every_round_is_committed_at_once() -> None:
    keeping = Keeping()
    assert [keeping.prepare(step, 0.0) for step in range(3)] == [[Prepare(step)] for step in range(3)]


def test_a_round_that_is_due_is_written_first_and_others_are_not() -> None:
    keeping = Keeping(KeepingPolicy(every_rounds=3))
    assert keeping.prepare(1, 0.0) == [Prepare(1)]
    keeping.committed()
    assert keeping.prepare(3, 0.0) == [KeepFirst(1)]
    assert keeping.is_waiting
    assert keeping.kept(1, True, 0.0) == [Prepare(3)]
    assert not keeping.is_waiting


@pytest.mark.parametrize("written", [True, False])
def test_a_round_is_committed_when_its_write_has_ended_well_or_badly(written: bool) -> None:
    keeping = Keeping(KeepingPolicy())
    assert keeping.prepare(1, 0.0) == [KeepFirst(1)]
    assert keeping.kept(1, written, 1.0) == [Prepare(1)]


def test_a_round_waits_for_its_write_no_longer_than_it_may_and_the_next_ones_not_at_all() -> None:
    keeping = Keeping(KeepingPolicy(timeout_s=5.0))
    keeping.prepare(1, 10.0)
    assert keeping.due_at_s == 15.0
    assert keeping.expire(14.9) == []
    assert keeping.expire(15.0) == [Prepare(1)]
    keeping.committed()
    assert keeping.prepare(2, 20.0) == [Prepare(2)], "the disk has not taken the first one yet"
    keeping.committed()
    assert keeping.kept(1, True, 21.0) == [], "its round is over"
    assert keeping.prepare(3, 22.0) == [KeepFirst(2)]


def test_a_late_end_of_the_write_of_a_round_that_started_over_commits_nothing() -> None:
    keeping = Keeping(KeepingPolicy())
    assert keeping.prepare(1, 0.0) == [KeepFirst(1)]
    keeping.start_over()
    assert keeping.kept(1, True, 1.0) == []
    assert not keeping.is_waiting


def test_a_round_whose_predecessor_was_written_in_vain_waits_for_that_and_takes_its_place_on_the_disk() -> None:
    keeping = Keeping(KeepingPolicy(every_rounds=2))
    assert keeping.prepare(2, 0.0) == [KeepFirst(1)]
    keeping.start_over()
    assert keeping.prepare(7, 1.0) == [], "it is not due, but the disk gets a center that was never committed"
    assert keeping.kept(1, True, 2.0) == [KeepFirst(2)]
    assert keeping.kept(2, True, 3.0) == [Prepare(7)]
    keeping.committed()
    assert keeping.prepare(9, 4.0) == [Prepare(9)]


def test_until_a_write_succeeds_rounds_after_one_that_was_written_in_vain_are_due() -> None:
    keeping = Keeping(KeepingPolicy(every_rounds=100))
    keeping.prepare(100, 0.0)
    keeping.kept(1, True, 1.0)
    keeping.start_over()  # the commit itself failed
    for step, token, written in ((101, 2, False), (102, 3, True)):
        assert keeping.prepare(step, 2.0) == [KeepFirst(token)]
        assert keeping.kept(token, written, 3.0) == [Prepare(step)]
        keeping.committed()
    assert keeping.prepare(103, 4.0) == [Prepare(103)]


def test_a_round_that_is_due_waits_for_a_write_of_the_present_center_and_others_do_not() -> None:
    keeping = Keeping(KeepingPolicy(every_rounds=2))
    token = keeping.begin()
    assert keeping.prepare(1, 0.0) == [Prepare(1)]
    keeping.committed()
    assert keeping.prepare(2, 1.0) == []
    assert keeping.is_waiting
    assert keeping.kept(token, True, 2.0) == [KeepFirst(2)]
    assert keeping.kept(2, True, 3.0) == [Prepare(2)]


def prepared(keeping: KeepingPolicy, round_timeout_s: float | None = None) -> tuple[Round, list[Decision]]:
    """A round with one push, on stream 1, and the decisions after its last fragment."""
    round_ = Round(RoundPolicy.strict(1, round_timeout_s), 1, keeping=keeping)
    round_.open(1, push("a"), 0.0)
    return round_, round_.take_fragments(1, 0, 1, 0.0)


def test_a_write_that_never_began_is_waited_for_by_no_round() -> None:
    keeping = Keeping(KeepingPolicy(1, None))
    assert keeping.prepare(1, 0.0) == [KeepFirst(1)]
    keeping.start_over(begun=0)
    assert keeping.prepare(1, 1.0) == [KeepFirst(2)]
    keeping.start_over(begun=2)  # it has ended, but the round was not told
    assert keeping.prepare(1, 2.0) == [KeepFirst(3)]
    assert keeping.kept(3, True, 3.0) == [Prepare(1)]


def test_a_prepared_round_is_committed_only_when_its_checkpoint_is_written() -> None:
    round_, decisions = prepared(KeepingPolicy())
    assert decisions[-1] == KeepFirst(1)
    assert round_.as_committed() == (1, ("a",), {"a": push("a").key})
    with pytest.raises(AssertionError):
        round_.commit(1.0)
    assert (round_.prepared, round_.global_step) == (True, 0)
    assert round_.kept(1, True, 2.0) == [Prepare(1)]
    assert round_.commit(2.0).global_step == 1


def test_the_time_that_a_round_waits_for_its_checkpoint_is_one_at_which_something_is_due() -> None:
    round_, _ = prepared(KeepingPolicy(timeout_s=5.0), round_timeout_s=5.0)
    assert round_.due_at_s == 5.0
    assert round_.expire(5.0) == [Prepare(1)], "and its streams, whose wait is over, are not timed out"


def test_an_abandoned_round_does_not_hear_of_its_checkpoint_any_more() -> None:
    round_, _ = prepared(KeepingPolicy())
    round_.abandon()
    assert round_.kept(1, True, 1.0) == []
    round_.open(2, push("a", number=2), 2.0)
    assert round_.take_fragments(2, 0, 1, 2.0)[-1] == KeepFirst(2)


@dataclass
class Disk:
    """A simple oracle: what the writes have put on the disk, and what a round must not do."""

    policy: KeepingPolicy
    keeping: Keeping
    now_s: float = 0.0
    step: int = 0
    under_way: dict[int, str] = field(default_factory=dict)  # by token: "aside", "round" or "void"
    is_void: bool = False  # whether a center that was never committed lies on the disk
    waits_since_s: float | None = None
    own: int | None = None
    overdue: bool = False

    def do(self, event: str) -> None:
        self.now_s += 1.0
        is_waiting = self.waits_since_s is not None
        if event == "prepare" and not is_waiting:
            self.step += 1
            self.own, self.waits_since_s = None, self.now_s
            self.follow(self.keeping.prepare(self.step, self.now_s))
        elif event == "aside" and not is_waiting:
            self.under_way[self.keeping.begin()] = "aside"
        elif event.startswith("end") and self.under_way:
            token = (min if event == "end first" else max)(self.under_way)
            what = self.under_way.pop(token)
            if what != "aside":  # the checkpoint of an older step does not replace that of a later one
                self.is_void = what == "void"
            self.overdue &= bool(self.under_way)
            self.follow(self.keeping.kept(token, True, self.now_s))
        elif event == "start over" and is_waiting:
            if self.own is not None:
                if self.own in self.under_way:
                    self.under_way[self.own] = "void"
                else:
                    self.is_void = True
            self.waits_since_s = self.own = None
            self.step -= 1
            self.keeping.start_over()
        elif event == "time":
            due_at_s = self.keeping.due_at_s
            if due_at_s is not None:
                self.now_s = max(self.now_s, due_at_s)
                self.overdue = True
                self.follow(self.keeping.expire(self.now_s))
        assert self.keeping.is_waiting == (self.waits_since_s is not None)

    def follow(self, decisions: list[KeepFirst | Prepare]) -> None:
        for decision in decisions:
            match decision:
                case KeepFirst(token):
                    assert not self.under_way, "it waits for earlier writes"
                    self.under_way[token], self.own = "round", token
                case Prepare(step):
                    assert self.waits_since_s is not None
                    assert step == self.step
                    is_due = step % self.policy.every_rounds == 0
                    if is_due and not self.overdue:
                        assert self.own is not None
                        assert self.own not in self.under_way
                    assert self.overdue or not self.is_void, "the disk has a center that was never committed"
                    self.waits_since_s = self.own = None
                    self.keeping.committed()


@thorough
@given(
    st.sampled_from([KeepingPolicy(), KeepingPolicy(3), KeepingPolicy(1, 5.0), KeepingPolicy(3, 5.0)]),
    st.lists(
        st.sampled_from(["prepare", "prepare", "aside", "end first", "end last", "start over", "time"]), max_size=40
    ),
)
def test_no_round_is_answered_before_it_is_on_the_disk_unless_it_has_waited_long_enough(
    policy: KeepingPolicy, events: list[str]
) -> None:
    disk = Disk(policy, Keeping(policy))
    for event in events:
        disk.do(event)
    for _ in range(5):  # nothing waits for ever
        disk.do("end first")
    assert disk.waits_since_s is None
