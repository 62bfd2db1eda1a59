"""The round: what always holds (docs/architecture.md), over random interleavings of workers, purposes and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
from hypothesis import given

from modelaverage.errors import Reason
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import (
    Accumulate,
    Addition,
    Admit,
    Commit,
    Dismiss,
    FinishFragment,
    Hold,
    Restart,
    TimeOut,
)
from tests.round_oracle import Committed, value_of
from tests.round_plans import Plan, plans, random_plan
from tests.round_play import Play, Process
from tests.strategies import thorough

_PLAYS = 300
_DRIVEN = 120


@cache
def played() -> list[tuple[Plan, Play]]:
    """The plans with which all rules are checked."""
    chosen = [random_plan(number) for number in range(_PLAYS)]
    return [(plan, plan.play()) for plan in chosen]


def commits() -> Iterator[tuple[Plan, Committed]]:
    return ((plan, committed) for plan, play in played() for committed in play.commits)


@thorough
@given(plans())
def test_everything_happens_as_the_oracle_wants_it(plan: Plan) -> None:
    play = plan.play()
    assert (play.surprises, play.changed, play.early, play.idle_expiries) == ([], [], [], [])


def test_everything_happens_as_the_oracle_wants_it_in_long_plays_too() -> None:
    for number, (_, play) in enumerate(played()):
        assert play.surprises == [], number


def test_rule_1_a_push_is_counted_at_most_once_and_a_worker_once_per_round() -> None:
    for _, play in played():
        counted = [push for committed in play.commits for push in committed.whole]
        assert len(set(counted)) == len(counted)
    for _, committed in commits():
        workers = [push.worker_id for push in committed.whole]
        assert len(set(workers)) == len(workers)


def test_rule_2_a_committed_round_averages_exactly_one_whole_push_of_each_contributor() -> None:
    for _, committed in commits():
        givers = [push for push in committed.whole if push.purpose is not Purpose.ABSTAIN]
        assert committed.commit.contributors == tuple(sorted(push.worker_id for push in givers))
        if not givers or any(push.purpose is Purpose.RESTORE for push in givers):
            continue
        for index, fragment in enumerate(committed.center):
            assert fragment is not None
            assert fragment.pushes == set(givers)
            weighted = [push.weight * value_of(push, index) for push in givers]
            assert fragment.average == pytest.approx(sum(weighted) / sum(push.weight for push in givers))
            assert fragment.untouched == committed.commit.untouched
            assert fragment.steps == (committed.base_step == committed.from_step)


def test_a_center_that_is_given_back_becomes_the_center_as_it_is_whatever_others_give() -> None:
    for _, committed in commits():
        restoring = [push for push in committed.whole if push.purpose is Purpose.RESTORE]
        if not restoring:
            continue
        first = min(restoring, key=lambda push: push.worker_id)
        for index, fragment in enumerate(committed.center):
            assert fragment is not None
            assert fragment.average == value_of(first, index)
            assert (fragment.steps, fragment.untouched, committed.commit.untouched) == (False, frozenset(), frozenset())


def test_a_round_in_which_all_abstain_leaves_the_center_as_it_was() -> None:
    abstained = [
        committed for _, committed in commits() if all(push.purpose is Purpose.ABSTAIN for push in committed.whole)
    ]
    assert len(abstained) > 100
    for committed in abstained:
        assert committed.center == committed.before
        assert committed.commit.contributors == ()


def test_rule_3_global_step_grows_by_one_with_every_commit_and_never_otherwise() -> None:
    for _, play in played():
        reached = play.steps[0]
        for committed in play.commits:
            # All may agree on a step that a server that was restored from an old checkpoint has forgotten.
            assert committed.base_step >= reached
            reached = committed.base_step + 1
            assert committed.commit.global_step == reached
        assert sorted(play.steps) == play.steps
        assert set(play.steps) == {play.steps[0], *(committed.commit.global_step for committed in play.commits)}


def test_rule_4_no_reader_sees_a_center_that_mixes_two_rounds() -> None:
    for _, play in played():
        made = {committed.center for committed in play.commits}
        for center in play.centers:
            assert len({fragment and fragment.pushes for fragment in center}) <= 1
            assert center in made or set(center) <= {None}


def test_rule_5_neither_a_stale_push_nor_a_rejected_message_changes_anything() -> None:
    for number, (_, play) in enumerate(played()):
        assert play.changed == [], number


def test_rule_6_a_round_commits_only_with_all_it_needs_less_those_that_have_finished() -> None:
    for plan, committed in commits():
        whole = {push.worker_id for push in committed.whole}
        left = plan.policy.num_workers - len(committed.excused - whole)
        assert min(plan.policy.min_workers, max(1, left)) <= len(whole) <= plan.policy.max_workers


def test_before_the_grace_period_is_over_a_round_commits_only_with_all_it_waits_for() -> None:
    for number, (_, play) in enumerate(played()):
        assert play.early == [], number


def test_when_time_is_due_something_happens_and_is_not_due_again_at_once() -> None:
    for number, (_, play) in enumerate(played()):
        assert play.idle_expiries == [], number


def test_the_random_interleavings_reach_every_decision_every_refusal_and_every_cause() -> None:
    seen = set[object]().union(*(play.seen for _, play in played()))
    assert seen == {
        *(Accumulate, Admit, Commit, Dismiss, FinishFragment, Hold, Restart, TimeOut),
        *Addition,
        *Outcome,
        *(Reason.BASE_STEP_AHEAD, Reason.WORKER_ID_IN_USE, Reason.ROUND_FULL),
        *(Reason.PUSH_SUPERSEDED, Reason.ROUND_RESTARTED, Reason.ROUND_TIMED_OUT),
        *(Reason.FRAGMENT_EXTRA, Reason.FRAGMENT_REPEATED, Reason.FRAGMENT_MISPLACED, Reason.FRAGMENT_MISSING),
        *("half-close", "early expiry"),
    }
    words = [text for _, play in played() for text in play.words]
    for cause in (
        *("makes another push", "takes the place", "left in the middle", "it waited", "broke off"),
        *("an earlier base step", "has room", "goes on without you"),
    ):
        assert any(cause in text for text in words), cause


# Rule 7: living workers can go on. These may be the first, the last or the second processes of the ids, or new ids.
_LIVE: dict[str, Callable[[Play, int], list[Process]]] = {
    "first": lambda play, count: play.processes[:count],
    "last": lambda play, count: play.processes[len(play.processes) // 2 :][-count:],
    "second": lambda play, count: play.processes[len(play.processes) // 2 :][:count],
    "new": lambda play, count: play.add_processes(count),
}


def drive_to_a_commit(play: Play, live: Sequence[Process]) -> float:
    """Lets these processes live and try again; the server notices that all others are gone. Returns how long it
    took."""
    for process in play.processes:
        if process not in live:
            play.break_off(process)
    play.notice(live[0])
    commits, began_at_s = len(play.commits), play.now_s
    for _ in range(100):
        for process in (*live, *live, *live, *live):  # an answer may ask for another try
            play.whole(process)
            play.notice(process)
            play.let_pass(0.0)
            if len(play.commits) > commits:
                return play.now_s - began_at_s
        play.until_due()
        if len(play.commits) > commits:
            return play.now_s - began_at_s
    raise AssertionError("the round hangs")


@pytest.mark.parametrize("who", _LIVE)
def test_rule_7_min_workers_live_workers_and_time_drive_a_round_to_a_commit(who: str) -> None:
    for number in range(_DRIVEN // len(_LIVE)):
        plan = random_plan(_PLAYS + number)
        play = plan.play()
        for process in play.processes:
            play.come_back(process)  # nobody has finished
        live, grace_s = _LIVE[who](play, plan.policy.min_workers), play.records.grace_s
        took_s = drive_to_a_commit(play, live)
        assert took_s <= 3 * grace_s, "for those who broke off, are late, and do not come back"
        grace_s = play.records.grace_s
        assert drive_to_a_commit(play, live) <= grace_s
        assert drive_to_a_commit(play, live) == 0.0, "those who missed a round are waited for again"
        assert {push.worker_id for push in play.commits[-1].whole} == {process.worker_id for process in live}
        assert play.surprises == []
        told = [stream for stream, _ in play.last_words]
        assert len(set(told)) == len(told), "every stream that was taken is told how it ended, once"
        assert play.closed.union(told).issuperset(play.taken), "unless it left first"


@pytest.mark.parametrize("who", ["first", "last", "second"])
def test_rule_7_a_round_commits_once_all_who_have_not_finished_have_pushed(who: str) -> None:
    for number in range(_DRIVEN // 3):
        plan = random_plan(2 * _PLAYS + number)
        play = plan.play(surplus=0)
        live, names = _LIVE[who](play, 1), list(dict.fromkeys(process.worker_id for process in play.processes))
        for process in play.processes:
            play.come_back(process)
            if process not in live:
                play.break_off(process)
        play.notice(live[0])
        names.remove(live[0].worker_id)
        for process in play.processes:
            if process.worker_id in names[: plan.policy.num_workers - 1]:
                play.finish(process)
            elif process.worker_id in names:
                play.leave(process)
        grace_s = play.records.grace_s
        assert drive_to_a_commit(play, live) <= 3 * grace_s
        assert drive_to_a_commit(play, live) <= play.records.grace_s
        assert drive_to_a_commit(play, live) == 0.0
        assert [push.worker_id for push in play.commits[-1].whole] == [live[0].worker_id]
        assert play.surprises == []


def test_when_all_have_finished_nobody_waits_and_the_job_is_over() -> None:
    for number in range(_DRIVEN):
        play = random_plan(3 * _PLAYS + number).play()
        for process in play.processes:
            play.break_off(process)
        play.notice(play.processes[0])
        for process in play.processes:
            play.finish(process)
        for _ in range(10):  # what is whole stays, and waits for the grace period at most
            play.until_due()
        assert play.round.waits_for[0] == set()
        assert (play.round.job_is_over, play.round.training) == (True, 0)
        assert play.surprises == []
