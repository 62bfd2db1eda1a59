"""The round in strict mode: each rule by an example."""

from __future__ import annotations

import re

import pytest

from modelaverage.errors import ConflictError, InvalidRequestError, ProtocolError, Reason
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Accumulate,
    Addition,
    Admit,
    CenterFollows,
    Commit,
    FinishFragment,
    Push,
    Restart,
    Verdict,
)
from tests.rounds import commit_of, dismissals, give, push, refused, strict, take


def test_a_round_of_two_finishes_each_fragment_and_commits_with_the_last() -> None:
    round_ = strict(2, 2, global_step=7)
    assert round_.open(1, push("b", step=7), 0.0) == [Admit(0)]
    assert round_.open(2, push("a", step=7), 0.0) == [Admit(0)]
    assert give(round_, 1, 0, 1) == []
    assert give(round_, 2, 0) == [FinishFragment(0, 2.0, frozenset())]
    finish, commit = give(round_, 2, 1)
    assert finish == FinishFragment(1, 2.0, frozenset())
    assert isinstance(commit, Commit)
    assert (commit.global_step, commit.contributors) == (8, ("a", "b"))
    assert (round_.global_step, round_.contributors) == (8, ("a", "b"))


def test_a_lone_worker_commits_with_its_own_last_fragment() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a"), 0.0)
    assert commit_of(give(round_, 1, 0)).verdicts == {1: Verdict(Outcome.COMMITTED, 0.0)}


def test_a_model_without_fragments_commits_when_all_have_come() -> None:
    round_ = strict(2, 0)
    assert round_.open(1, push("a"), 0.0) == [Admit(0)]
    assert commit_of(round_.open(2, push("b"), 3.0)).verdicts[1] == Verdict(Outcome.COMMITTED, 3.0)


def test_a_stale_push_changes_nothing() -> None:
    round_ = strict(2, 1, global_step=4)
    round_.open(1, push("a", step=4), 0.0)
    assert round_.open(2, push("b", step=3), 0.0) == [CenterFollows(Outcome.STALE)]
    with pytest.raises(ProtocolError) as error:
        give(round_, 2, 0)
    assert refused(error) is Reason.FRAGMENT_REPEATED
    round_.check_complete(2)
    round_.close(2, 0.0)
    assert (round_.given("b"), round_.global_step) == (0, 4)
    assert round_.open(3, push("c", step=4), 0.0) == [Admit(0)]


def test_a_stale_push_does_not_disturb_the_push_of_the_same_worker_that_is_in_the_round() -> None:
    round_ = strict(2, 2, global_step=4)
    round_.open(1, push("a", number=2, step=4), 0.0)
    give(round_, 1, 0)
    assert round_.open(2, push("a", number=1, step=3), 0.0) == [CenterFollows(Outcome.STALE)]
    assert give(round_, 1, 1) == []
    assert round_.complete == {"a"}


def test_a_later_base_step_on_which_all_agree_is_adopted() -> None:
    round_ = strict(2, 1, global_step=4)
    assert round_.open(1, push("a", step=9, untouched=(0,)), 0.0) == [Admit(0)]
    assert round_.open(2, push("b", step=9, untouched=(0,)), 0.0) == [Admit(0)]
    give(round_, 1, 0)
    finish, commit = give(round_, 2, 0)
    assert isinstance(commit, Commit)
    assert (commit.global_step, round_.global_step) == (10, 10)
    assert finish == FinishFragment(0, 2.0, frozenset(), steps=False), "the server's center is not the one they left"
    assert commit.untouched == frozenset()


def test_a_push_from_ahead_of_the_others_is_refused() -> None:
    round_ = strict(2, 1, global_step=4)
    round_.open(1, push("a", step=4), 0.0)
    with pytest.raises(ConflictError, match="'b' pushes from base step 5, but the server is at global_step 4") as error:
        round_.open(2, push("b", step=5), 0.0)
    assert refused(error) is Reason.BASE_STEP_AHEAD
    assert give(round_, 1, 0) == []


def test_those_who_are_ahead_are_refused_once_somebody_is_not() -> None:
    round_ = strict(2, 1, global_step=4)
    round_.open(1, push("a", step=9), 0.0)
    give(round_, 1, 0)
    decisions = round_.open(2, push("b", step=4), 0.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == {1: Reason.BASE_STEP_AHEAD}
    assert decisions[-1] == Admit(0)
    assert round_.complete == frozenset()


def test_a_retry_is_asked_only_for_what_is_missing() -> None:
    round_ = strict(2, 3)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0, 1)
    round_.close(1, 0.0)
    assert round_.open(2, push("a"), 0.0) == [Admit(2)]
    give(round_, 2, 2)
    assert round_.complete == {"a"}


def test_a_retry_takes_the_place_of_the_call_before() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    decisions = round_.open(2, push("a"), 0.0)
    assert dismissals(decisions) == {1: Reason.PUSH_SUPERSEDED}
    assert decisions[-1] == Admit(1)
    round_.close(1, 0.0)  # too late to matter
    assert give(round_, 2, 1) == []


def test_a_retry_of_a_counted_push_is_answered_with_the_center() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    assert round_.open(2, push("a"), 0.0) == [CenterFollows(Outcome.ALREADY_COUNTED)]
    assert not round_.under_way


def test_a_retry_of_a_push_that_was_counted_two_rounds_ago_is_stale() -> None:
    round_ = strict(1, 1)
    for step in (0, 1):
        round_.open(step, push("a", number=step, step=step), 0.0)
        give(round_, step, 0)
    assert round_.open(9, push("a", number=0, step=0), 0.0) == [CenterFollows(Outcome.STALE)]


def test_the_same_push_number_of_another_process_is_another_push() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a", process=1), 0.0)
    give(round_, 1, 0)
    assert round_.open(2, push("a", process=2, step=1), 0.0) == [Admit(0)]


def test_the_round_starts_over_when_a_half_made_push_is_abandoned() -> None:
    round_ = strict(3, 2)
    round_.open(1, push("a"), 0.0)
    round_.open(2, push("b"), 0.0)
    give(round_, 1, 0)
    give(round_, 2, 0, 1)
    round_.close(1, 0.0)
    decisions = round_.open(3, push("a", process=2), 0.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == {2: Reason.ROUND_RESTARTED}
    assert decisions[-1] == Admit(0)
    assert round_.complete == frozenset()
    assert take(round_, 3, 0) == Accumulate(0, 1.0, Addition.START), "nothing of the old sums is left"
    assert round_.open(4, push("b"), 0.0) == [Admit(0)]


def test_a_process_that_makes_another_push_before_the_first_was_whole_starts_the_round_over() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a", number=1), 0.0)
    give(round_, 1, 0)
    decisions = round_.open(2, push("a", number=2), 0.0)
    assert dismissals(decisions) == {1: Reason.PUSH_SUPERSEDED}
    assert any(isinstance(decision, Restart) for decision in decisions)
    assert decisions[-1] == Admit(0)


def test_a_push_that_never_began_is_replaced_without_starting_over() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a", number=1, weight=2.0), 0.0)
    assert not any(isinstance(d, Restart) for d in round_.open(2, push("a", number=2, weight=5.0), 0.0))
    accumulate, finish, _ = round_.take_fragments(2, 0, 1, 0.0)
    assert accumulate == Accumulate(0, 5.0, Addition.START)
    assert finish == FinishFragment(0, 5.0, frozenset())


def test_the_pushes_of_a_round_that_started_over_are_not_counted() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("b"), 0.0)
    give(round_, 1, 0, 1)
    round_.open(2, push("a", process=1), 0.0)
    give(round_, 2, 0)
    round_.close(2, 0.0)
    round_.open(3, push("a", process=2), 0.0)
    assert give(round_, 3, 0, 1) == []  # b, whole before, has to come again
    assert round_.open(4, push("b"), 0.0) == [Admit(0)]
    assert commit_of(give(round_, 4, 0, 1)).contributors == ("a", "b")


def test_a_restarted_worker_whose_push_was_whole_is_counted_once() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a", process=1), 0.0)
    give(round_, 1, 0)
    round_.close(1, 0.0)
    assert round_.open(2, push("a", process=2), 0.0) == [Admit(1)]
    round_.open(3, push("b"), 0.0)
    commit = commit_of(give(round_, 3, 0))
    assert commit.contributors == ("a", "b")
    assert {stream: verdict.outcome for stream, verdict in commit.verdicts.items()} == {
        2: Outcome.ALREADY_COUNTED,
        3: Outcome.COMMITTED,
    }


def test_the_whole_push_of_a_worker_that_died_stays_in_the_round() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    round_.close(1, 0.0)
    round_.open(2, push("b"), 0.0)
    commit = commit_of(give(round_, 2, 0))
    assert commit.contributors == ("a", "b")
    assert commit.verdicts.keys() == {2}


def test_another_live_process_under_the_same_id_is_refused() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a", process=1), 0.0)
    with pytest.raises(ConflictError, match="'a' is in use by another live process") as error:
        round_.open(2, push("a", process=2), 0.0)
    assert refused(error) is Reason.WORKER_ID_IN_USE
    assert give(round_, 1, 0, 1) == []


def test_another_process_under_the_same_id_is_refused_while_the_first_waits_at_the_barrier() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a", process=1), 0.0)
    give(round_, 1, 0)
    with pytest.raises(ConflictError):
        round_.open(2, push("a", process=2), 0.0)
    round_.open(3, push("b"), 0.0)
    assert commit_of(give(round_, 3, 0)).verdicts[1].outcome is Outcome.COMMITTED


def test_a_worker_that_breaks_off_before_its_first_fragment_leaves_the_round() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a"), 0.0)
    round_.close(1, 0.0)
    assert not round_.under_way
    assert round_.open(2, push("b"), 0.0) == [Admit(0)]


def test_a_newcomer_takes_the_place_of_a_broken_push() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 0.0)
    round_.open(2, push("b"), 0.0)
    give(round_, 1, 0)
    give(round_, 2, 0)
    round_.close(1, 0.0)
    decisions = round_.open(3, push("c"), 0.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == {2: Reason.ROUND_RESTARTED}
    assert decisions[-1] == Admit(0)
    round_.open(4, push("b"), 0.0)
    give(round_, 3, 0, 1)
    assert commit_of(give(round_, 4, 0, 1)).contributors == ("b", "c")


def test_a_broken_push_keeps_its_place_while_there_is_room() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    round_.close(1, 0.0)
    assert round_.open(2, push("b"), 0.0) == [Admit(0)]
    assert round_.open(3, push("a"), 0.0) == [Admit(1)]


def test_a_header_that_comes_late_does_not_disturb_the_push_after_it() -> None:
    round_ = strict(2, 2)
    later, earlier = (Push("a", bytes(16), push_id, 0) for push_id in (2, 1))
    round_.open(1, later, 0.0)
    give(round_, 1, 0)
    with pytest.raises(ConflictError) as refused:
        round_.open(2, earlier, 1.0)
    assert refused.value.reason is Reason.PUSH_SUPERSEDED
    assert round_.holds(1)
    assert round_.given("a") == 1


def test_one_worker_too_many_is_refused() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 0.0)
    round_.open(2, push("b"), 0.0)
    give(round_, 1, 0)
    with pytest.raises(
        ConflictError, match=r"'c' is one too many for round 0, which has its 2 workers \('a', 'b'\)"
    ) as error:
        round_.open(3, push("c"), 0.0)
    assert refused(error) is Reason.ROUND_FULL
    assert round_.given("a") == 1


def test_a_whole_push_keeps_its_place_although_its_worker_is_gone() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    round_.close(1, 0.0)
    round_.open(2, push("b"), 0.0)
    with pytest.raises(ConflictError):
        round_.open(3, push("c"), 0.0)


def test_fragments_are_added_with_the_weight_of_their_push_and_divided_by_the_sum() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a", weight=3.0), 0.0)
    round_.open(2, push("b", weight=0.5), 0.0)
    assert take(round_, 1, 0) == Accumulate(0, 3.0, Addition.START)
    accumulate, finish, _ = round_.take_fragments(2, 0, 1, 0.0)
    assert accumulate == Accumulate(0, 0.5, Addition.ADD)
    assert finish == FinishFragment(0, 3.5, frozenset())


def test_only_variables_that_all_contributors_left_are_untouched() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a", untouched=(0, 1, 4)), 0.0)
    round_.open(2, push("b", untouched=(1, 2, 4)), 0.0)
    give(round_, 1, 0)
    finish, commit = give(round_, 2, 0)
    assert isinstance(finish, FinishFragment)
    assert isinstance(commit, Commit)
    assert finish.untouched == commit.untouched == {1, 4}


def test_waited_s_counts_from_the_whole_push_to_the_commit() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 10.0)
    give(round_, 1, 0, now_s=11.0)
    give(round_, 1, 1, now_s=13.0)
    round_.open(2, push("b"), 14.0)
    assert round_.age_s(15.0) == 5.0
    commit = commit_of(give(round_, 2, 0, 1, now_s=20.0))
    assert commit.verdicts == {1: Verdict(Outcome.COMMITTED, 7.0), 2: Verdict(Outcome.COMMITTED, 0.0)}
    assert commit.round_s == 10.0
    assert round_.age_s(21.0) == 0.0


def test_waited_s_of_a_retry_counts_from_when_the_push_came_whole() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0, now_s=2.0)
    round_.close(1, 0.0)
    round_.open(2, push("a"), 5.0)
    round_.open(3, push("b"), 5.0)
    assert commit_of(give(round_, 3, 0, now_s=6.0)).verdicts[2] == Verdict(Outcome.COMMITTED, 4.0)


@pytest.mark.parametrize(
    ("index", "reason"),
    [(0, Reason.FRAGMENT_REPEATED), (2, Reason.FRAGMENT_MISPLACED), (3, Reason.FRAGMENT_EXTRA)],
)
def test_a_fragment_that_is_not_the_next_one_is_refused(index: int, reason: Reason) -> None:
    round_ = strict(2, 3)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    with pytest.raises(ProtocolError, match=f"fragment {index} ") as error:
        give(round_, 1, index)
    assert refused(error) is reason
    assert give(round_, 1, 1, 2) == []


def test_a_push_that_ends_early_lacks_fragments_and_may_be_made_again() -> None:
    round_ = strict(2, 3)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    with pytest.raises(ProtocolError, match="after 1 of 3 fragments") as error:
        round_.check_complete(1)
    assert refused(error) is Reason.FRAGMENT_MISSING
    round_.close(1, 0.0)
    assert round_.open(2, push("a"), 0.0) == [Admit(1)]


def test_a_stream_that_has_given_all_may_end_before_or_after_the_commit() -> None:
    round_ = strict(1, 1)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    round_.check_complete(1)
    round_.close(1, 0.0)
    round_.close(1, 0.0)
    assert not round_.under_way


def test_the_status_tells_who_has_given_what() -> None:
    round_ = strict(2, 2)
    assert (round_.under_way, round_.full, round_.complete, round_.given("a")) == (False, False, frozenset(), 0)
    round_.open(1, push("a"), 0.0)
    give(round_, 1, 0)
    assert (round_.under_way, round_.full, round_.complete, round_.given("a")) == (True, False, frozenset(), 1)
    give(round_, 1, 1)
    round_.close(1, 0.0)
    round_.open(2, push("b"), 0.0)
    assert round_.full
    assert round_.complete == {"a"}
    give(round_, 2, 0)
    round_.close(2, 0.0)
    assert not round_.full, "b broke off, and may never come back"


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.99e-9, 1.01e9, float("inf"), float("nan")])
def test_a_weight_that_is_not_from_1e_9_to_1e9_is_refused(weight: float) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(f"weight {weight:g} ")) as error:
        push("a", weight=weight)
    assert refused(error) is Reason.WEIGHT_INVALID


@pytest.mark.parametrize("worker_id", ["", "x" * 129, "é" * 65])
def test_a_worker_id_that_has_not_1_to_128_bytes_is_refused(worker_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="worker id ") as error:
        push(worker_id)
    assert refused(error) is Reason.WORKER_ID_INVALID


@pytest.mark.parametrize("size_bytes", [0, 15, 17])
def test_an_incarnation_that_has_not_16_bytes_is_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{size_bytes} bytes") as error:
        Push("a", bytes(size_bytes), 1, 0)
    assert refused(error) is Reason.INCARNATION_INVALID


def test_the_limits_themselves_are_accepted() -> None:
    for accepted in (push("x" * 128), push("a", weight=1e-9), push("a", weight=1e9)):
        assert strict(1, 1).open(1, accepted, 0.0) == [Admit(0)]
