"""A push contributes, abstains or restores a lost center: each rule by an example."""

from __future__ import annotations

import pytest

from modelaverage.errors import ProtocolError, Reason
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Accumulate, Addition, Admit, Commit, FinishFragment, Hold
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.rounds import commit_of, give, push, refused, strict, take

ABSTAIN, RESTORE = Purpose.ABSTAIN, Purpose.RESTORE


def test_a_push_that_abstains_owes_no_fragments_and_is_whole_at_once() -> None:
    round_ = strict(2, 3)
    assert round_.open(1, push("a", purpose=ABSTAIN), 0.0) == [Admit(3)]
    round_.check_complete(1)
    assert round_.complete == {"a"}
    with pytest.raises(ProtocolError) as error:
        give(round_, 1, 0)
    assert refused(error) is Reason.FRAGMENT_REPEATED


def test_a_push_that_abstains_counts_at_the_barrier_and_not_in_the_average() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a", purpose=ABSTAIN, weight=7.0, untouched=()), 0.0)
    round_.open(2, push("b", weight=3.0, untouched=(0,)), 1.0)
    assert give(round_, 2, 0) == [FinishFragment(0, 3.0, frozenset({0}))], "nobody else gives any"
    commit = commit_of(give(round_, 2, 1))
    assert (commit.contributors, commit.untouched) == (("b",), frozenset({0}))
    assert {verdict.outcome for verdict in commit.verdicts.values()} == {Outcome.COMMITTED}
    assert set(round_.counted) == {"a", "b"}


def test_a_retry_of_a_push_that_abstained_is_already_counted() -> None:
    round_ = strict(1, 2)
    abstaining = push("a", purpose=ABSTAIN)
    round_.open(1, abstaining, 0.0)
    (answer,) = round_.open(2, abstaining, 1.0)
    assert answer.outcome is Outcome.ALREADY_COUNTED  # type: ignore[union-attr]


def test_a_worker_that_abstained_and_is_gone_stays_in_the_round() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a", purpose=ABSTAIN), 0.0)
    round_.close(1, 1.0)
    assert round_.complete == {"a"}
    round_.open(2, push("b"), 1.0)
    assert commit_of(give(round_, 2, 0)).contributors == ("b",)


def test_a_push_that_has_given_nothing_may_become_one_that_abstains() -> None:
    round_ = strict(2, 1)
    round_.open(1, push("a"), 0.0)
    round_.open(2, push("b"), 0.0)
    assert give(round_, 2, 0) == []
    finish, commit = round_.open(3, push("a", number=2, purpose=ABSTAIN), 1.0)[-2:]
    assert finish == FinishFragment(0, 1.0, frozenset())
    assert isinstance(commit, Commit)
    assert commit.contributors == ("b",)


def test_if_all_abstain_the_center_stays_as_it_is() -> None:
    round_ = strict(2, 2, global_step=4)
    round_.open(1, push("a", step=4, purpose=ABSTAIN), 0.0)
    *finished, commit = round_.open(2, push("b", step=4, purpose=ABSTAIN), 1.0)[1:]
    assert finished == [FinishFragment(index, 0.0, frozenset(), steps=False) for index in range(2)]
    assert isinstance(commit, Commit)
    assert (commit.global_step, commit.contributors) == (5, ())


def test_with_a_quorum_one_that_abstains_is_waited_for_in_the_next_round() -> None:
    round_ = Round(RoundPolicy(2, 1, 2, grace_s=5.0), 1)
    round_.open(1, push("a", purpose=ABSTAIN), 0.0)
    assert round_.due_at_s == 5.0
    round_.open(2, push("b"), 0.0)
    give(round_, 2, 0)
    round_.open(3, push("b", number=2, step=1), 1.0)
    give(round_, 3, 0, now_s=1.0)
    assert round_.waits_for == (frozenset("a"), 0)


def test_one_that_abstains_too_late_is_held() -> None:
    round_ = Round(RoundPolicy(1, 1, 2, grace_s=5.0), 1)
    round_.open(1, push("b"), 0.0)
    assert round_.open(2, push("a", purpose=ABSTAIN), 0.0) == [Hold()]
    assert commit_of(give(round_, 1, 0)).held == (2,)


@pytest.mark.parametrize("first", ["the one that restores", "the other"])
def test_a_center_that_is_given_back_takes_the_place_of_what_others_give(first: str) -> None:
    round_ = strict(2, 1, global_step=4)
    round_.open(1, push("a", step=4, weight=3.0, untouched=(0,)), 0.0)
    round_.open(2, push("b", step=4, weight=5.0, untouched=(0,), purpose=RESTORE), 0.0)
    if first == "the other":
        assert take(round_, 1, 0) == Accumulate(0, 3.0, Addition.START)
        accumulate, finish, commit = round_.take_fragments(2, 0, 1, 0.0)
        assert accumulate == Accumulate(0, 1.0, Addition.START)
    else:
        assert take(round_, 2, 0) == Accumulate(0, 1.0, Addition.START)
        accumulate, finish, commit = round_.take_fragments(1, 0, 1, 0.0)
        assert accumulate == Accumulate(0, 3.0, Addition.IGNORE)
    assert finish == FinishFragment(0, 1.0, frozenset(), steps=False)
    assert isinstance(commit, Commit)
    assert (commit.contributors, commit.untouched) == (("a", "b"), frozenset())
    assert {verdict.outcome for verdict in commit.verdicts.values()} == {Outcome.COMMITTED}


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
def test_of_several_centers_the_one_of_the_worker_that_sorts_first_counts(order: str) -> None:
    round_ = strict(3, 1)
    for stream, worker_id in enumerate("abc"):
        round_.open(stream, push(worker_id, purpose=Purpose.CONTRIBUTE if worker_id == "a" else RESTORE), 0.0)
    last_start = [name for name in order if take(round_, "abc".index(name), 0).how is Addition.START][-1]
    assert last_start == "b"


def test_a_center_that_is_given_back_in_part_is_nothing_until_it_is_whole() -> None:
    round_ = strict(2, 2)
    round_.open(1, push("a"), 0.0)
    round_.open(2, push("b", purpose=RESTORE), 0.0)
    give(round_, 1, 0)
    assert take(round_, 2, 0).how is Addition.START
    assert take(round_, 1, 1).how is Addition.START, "the one that restores has not given this one yet"
    round_.close(2, 1.0)
    round_.open(3, push("b", number=2), 1.0)  # it begins again, to contribute
    round_.open(4, push("a"), 1.0)
    assert take(round_, 3, 0).how is Addition.START
    assert take(round_, 4, 0).how is Addition.ADD, "nothing of the center that was given back is left"


def test_a_center_of_a_later_step_may_be_given_back_beside_those_who_abstain() -> None:
    round_ = strict(3, 1, global_step=2)
    round_.open(1, push("a", step=8, purpose=ABSTAIN), 0.0)
    round_.open(2, push("b", step=8, purpose=RESTORE), 0.0)
    round_.open(3, push("c", step=8, purpose=ABSTAIN), 0.0)
    finish, commit = give(round_, 2, 0)
    assert finish == FinishFragment(0, 1.0, frozenset(), steps=False)
    assert isinstance(commit, Commit)
    assert (commit.global_step, commit.contributors) == (9, ("b",))


def test_the_outer_step_is_made_only_from_the_center_that_the_workers_started_from() -> None:
    for base_step, steps in ((4, True), (6, False)):
        round_ = strict(1, 1, global_step=4)
        round_.open(1, push("a", step=base_step), 0.0)
        assert give(round_, 1, 0)[0] == FinishFragment(0, 1.0, frozenset(), steps)
