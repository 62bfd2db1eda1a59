"""The round with a quorum: the rules over random interleavings of workers and time, then each rule by an example."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.errors import ConflictError, Reason
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Admit,
    CenterFollows,
    Commit,
    Dismiss,
    FinishFragment,
    Hold,
    Restart,
    TimeOut,
    Verdict,
)
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.quorum import Lateness
from tests.committing import CommittingRound as Round
from tests.committing import Decided
from tests.quorum_play import EVENTS, SECOND, Plan, Play
from tests.round_oracle import Event, Process, value_of
from tests.strategies import fast
from tests.test_round import commit_of, dismissals, give, push, refused

# Plans: in each phase only some workers do anything; the others are late, or dead.

_NUM_WORKERS = [2, 3, 3, 4]
_MIN_WORKERS = [1, 2, 2, 3, 4]
_GRACE_S = [0.0, 2.0, 2.0, 5.0, None]
_ROUND_TIMEOUT_S = [None, None, 1.5, 8.0]
_FRAGMENT_COUNT = [0, 1, 2, 3, 3]
_Phase = tuple[Sequence[int], Sequence[Event]]


def policy_of(num: int, min_: int, more: int, grace_s: float | None, round_timeout_s: float | None) -> RoundPolicy:
    if min_ >= num:
        return RoundPolicy.strict(num, round_timeout_s)
    return RoundPolicy(num, min_, num + more, grace_s, round_timeout_s)


def plan_of(policy: RoundPolicy, fragment_count: int, phases: Sequence[_Phase]) -> Plan:
    events = [
        event if event.actor >= SECOND else Event(event.kind, active[event.actor % len(active)])
        for active, of_phase in phases
        for event in of_phase
    ]
    return Plan(policy, fragment_count, tuple(events))


def plans() -> st.SearchStrategy[Plan]:
    policies = st.builds(
        policy_of,
        st.sampled_from(_NUM_WORKERS),
        st.sampled_from(_MIN_WORKERS),
        st.integers(0, 1),
        st.sampled_from(_GRACE_S),
        st.sampled_from(_ROUND_TIMEOUT_S),
    )
    active = st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)
    phases = st.tuples(active, st.lists(st.sampled_from(EVENTS), min_size=4, max_size=16))
    return st.builds(plan_of, policies, st.sampled_from(_FRAGMENT_COUNT), st.lists(phases, min_size=2, max_size=6))


def random_plan(chance: random.Random) -> Plan:
    """Longer than those that hypothesis makes."""
    num_workers, min_workers, more = chance.choice(_NUM_WORKERS), chance.choice(_MIN_WORKERS), chance.randint(0, 1)
    policy = policy_of(num_workers, min_workers, more, chance.choice(_GRACE_S), chance.choice(_ROUND_TIMEOUT_S))
    phases = [
        (chance.sample(range(5), chance.randint(1, 4)), chance.choices(EVENTS, k=chance.randint(4, 24)))
        for _ in range(chance.randint(3, 8))
    ]
    return plan_of(policy, chance.choice(_FRAGMENT_COUNT), phases)


@cache
def long_plays() -> list[Play]:
    return [random_plan(random.Random(number)).play() for number in range(300)]


# Rules over random interleavings.


@fast
@given(plans())
def test_everything_happens_as_the_records_want_it(plan: Plan) -> None:
    assert plan.play().surprises == []


def test_everything_happens_as_the_records_want_it_in_long_plays_too() -> None:
    for number, play in enumerate(long_plays()):
        assert (play.surprises, play.changed, play.early, play.idle_expiries) == ([], [], [], []), number


@fast
@given(plans())
def test_rule_1_a_push_is_counted_at_most_once_and_a_worker_once_per_round(plan: Plan) -> None:
    play = plan.play()
    counted = [push for committed in play.commits for push in committed.whole]
    assert len(set(counted)) == len(counted)
    for committed in play.commits:
        for fragment in committed.center:
            assert fragment is not None
            workers = [given.push.worker_id for given in fragment.contents]
            assert len(set(workers)) == len(workers)


@fast
@given(plans())
def test_rule_2_every_fragment_of_an_average_has_exactly_one_whole_push_of_each_contributor(plan: Plan) -> None:
    for committed in plan.play().commits:
        whole = frozenset(committed.whole)
        assert committed.commit.contributors == tuple(sorted(push.worker_id for push in whole))
        for index, fragment in enumerate(committed.center):
            assert fragment is not None
            assert fragment.pushes == whole
            weighted = [push.weight * value_of(push, index) for push in whole]
            assert fragment.average == pytest.approx(sum(weighted) / sum(push.weight for push in whole))
            assert fragment.untouched == committed.commit.untouched


@fast
@given(plans())
def test_rule_3_global_step_grows_by_one_with_every_commit_and_never_otherwise(plan: Plan) -> None:
    play = plan.play()
    reached = play.steps[0]
    for committed in play.commits:
        (base_step,) = {push.base_step for push in committed.whole}
        assert base_step >= reached
        reached = base_step + 1
        assert committed.commit.global_step == reached
    assert sorted(play.steps) == play.steps
    assert set(play.steps) == {play.steps[0], *(committed.commit.global_step for committed in play.commits)}


@fast
@given(plans())
def test_rule_5_neither_a_stale_push_nor_a_rejected_message_changes_anything_that_is_averaged(plan: Plan) -> None:
    assert plan.play().changed == []


@fast
@given(plans())
def test_rule_6_a_round_has_at_least_min_workers_and_in_strict_mode_all(plan: Plan) -> None:
    policy = plan.policy
    for committed in plan.play().commits:
        assert policy.min_workers <= len(committed.commit.contributors) <= policy.max_workers


@fast
@given(plans())
def test_before_the_time_of_grace_is_over_a_round_commits_only_with_all_for_whom_it_waits(plan: Plan) -> None:
    assert plan.play().early == []


@fast
@given(plans())
def test_when_time_is_due_something_happens_and_is_not_due_again_at_once(plan: Plan) -> None:
    assert plan.play().idle_expiries == []


# Who may be left: the first, the last or the second processes of the ids of the play, or new ids.
_LIVE: dict[str, Callable[[Play, int], list[Process]]] = {
    "first": lambda play, count: play.processes[:count],
    "last": lambda play, count: play.processes[len(play.processes) // 2 :][-count:],
    "second": lambda play, count: play.processes[len(play.processes) // 2 :][:count],
    "new": lambda play, count: play.add_processes(count),
}


def drive_to_a_commit(play: Play, live: Sequence[Process]) -> float:
    """These processes live and try again, all others are gone, and the server notices it. Returns how long it took."""
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
        play.until_due(live[0])
        if len(play.commits) > commits:
            return play.now_s - began_at_s
    raise AssertionError("the round hangs")


@fast
@given(plans(), st.sampled_from(sorted(_LIVE)))
def test_rule_7_min_workers_live_workers_and_time_drive_a_round_to_a_commit(plan: Plan, who: str) -> None:
    play = plan.play()
    live, grace_s = _LIVE[who](play, plan.policy.min_workers), play.records.grace_s
    assert drive_to_a_commit(play, live) <= 3 * grace_s, "for those who broke off, are late, and do not come back"
    grace_s = play.records.grace_s
    assert drive_to_a_commit(play, live) <= grace_s
    assert drive_to_a_commit(play, live) == 0.0, "those who missed a round are waited for again"
    assert play.commits[-1].commit.contributors == tuple(sorted(process.worker_id for process in live))
    assert play.surprises == []


@fast
@given(plans(), st.sampled_from(sorted(_LIVE)))
def test_rule_7_every_stream_that_was_taken_is_told_how_it_ended_once_unless_it_left_first(
    plan: Plan, who: str
) -> None:
    play = plan.play()
    drive_to_a_commit(play, _LIVE[who](play, plan.policy.min_workers))
    told = [stream for stream, _ in play.last_words]
    assert len(set(told)) == len(told)
    assert play.closed.union(told).issuperset(play.taken), "a stream was forgotten"


def test_the_random_interleavings_reach_every_decision_and_every_cause() -> None:
    seen: set[object] = set()
    words: list[str] = []
    for play in long_plays():
        seen |= play.seen
        words += play.words
    assert seen == {
        *(Admit, Commit, Dismiss, FinishFragment, Hold, Restart, TimeOut),
        *(Outcome.COMMITTED, Outcome.STALE, Outcome.ALREADY_COUNTED),
        *(Reason.BASE_STEP_AHEAD, Reason.WORKER_ID_IN_USE, Reason.ROUND_FULL),
        *(Reason.PUSH_SUPERSEDED, Reason.ROUND_RESTARTED, Reason.ROUND_TIMED_OUT),
        *("half-close", "early expiry"),
    }
    for cause in (
        *(
            "makes another push",
            "takes the place",
            "left in the middle",
            "it waited",
            "broke off",
            "an earlier base step",
        ),
        *("has room", "goes on without you"),
    ):
        assert any(cause in text for text in words), cause


# Rules by example. Workers a, b, c; three to be, two are enough, ten seconds of grace.


def quorum(
    num_workers: int = 3,
    min_workers: int = 2,
    max_workers: int | None = None,
    *,
    fragment_count: int = 2,
    grace_s: float | None = 10.0,
    round_timeout_s: float | None = None,
) -> Round:
    most = num_workers if max_workers is None else max_workers
    return Round(RoundPolicy(num_workers, min_workers, most, grace_s, round_timeout_s), fragment_count)


def after_a_round(
    *worker_ids: str, min_workers: int = 2, max_workers: int = 4, round_timeout_s: float | None = None
) -> Round:
    """A round with a quorum that these workers have contributed to. It began and ended at 0 s; streams are below 0."""
    round_ = quorum(len(worker_ids), min_workers, max_workers, round_timeout_s=round_timeout_s)
    for number, worker_id in enumerate(worker_ids, 1):
        whole(round_, -number, worker_id, step=0, now_s=0.0)
    assert round_.contributors == worker_ids
    return round_


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


def expire_when_due(round_: Round, due_at_s: float) -> list[Decided]:
    assert round_.due_at_s == due_at_s
    before = repr(round_)
    assert round_.expire(due_at_s - 0.01) == []
    assert repr(round_) == before, "it came too early"
    return round_.expire(due_at_s)


def test_a_round_with_its_quorum_waits_for_the_time_of_grace_and_commits_with_whom_it_has() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    assert round_.due_at_s is None, "one push is no quorum"
    assert not any(isinstance(decision, Commit) for decision in whole(round_, 2, "b", now_s=3.0))
    finish, finish_too, commit = expire_when_due(round_, 13.0)
    assert finish == FinishFragment(0, 2.0, frozenset())
    assert finish_too == FinishFragment(1, 2.0, frozenset())
    assert isinstance(commit, Commit)
    assert (commit.global_step, commit.contributors, commit.round_s) == (2, ("a", "b"), 12.0)
    assert commit.verdicts == {1: Verdict(Outcome.COMMITTED, 12.0), 2: Verdict(Outcome.COMMITTED, 10.0)}
    assert round_.due_at_s is None


def test_a_round_commits_at_once_when_all_for_whom_it_waits_are_whole() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=2.0)
    assert commit_of(whole(round_, 3, "c", now_s=3.0)).contributors == ("a", "b", "c")


def test_the_time_of_grace_begins_with_the_quorum_and_is_not_prolonged() -> None:
    round_ = after_a_round("a", "b", "c", "d")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=3.0)
    whole(round_, 3, "c", now_s=9.0)
    assert commit_of(expire_when_due(round_, 13.0)).contributors == ("a", "b", "c")


def test_the_first_round_waits_for_num_workers_and_then_for_the_time_of_grace() -> None:
    round_ = quorum()
    whole(round_, 1, "a", step=0, now_s=1.0)
    whole(round_, 2, "b", step=0, now_s=2.0)
    assert round_.waits_for == (frozenset(), 1)
    assert commit_of(expire_when_due(round_, 12.0)).contributors == ("a", "b")


def without_c() -> Round:
    """After two rounds, the first with a, b and c, the second without c; the time is 12 s."""
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=2.0)
    assert commit_of(expire_when_due(round_, 12.0)).global_step == 2
    return round_


def test_a_worker_that_missed_a_round_is_not_waited_for_again() -> None:
    round_ = without_c()
    whole(round_, 3, "a", step=2, now_s=20.0)
    assert commit_of(whole(round_, 4, "b", step=2, now_s=21.0)).contributors == ("a", "b")


def test_a_worker_that_missed_a_round_is_waited_for_once_it_shows_up_with_a_stale_push() -> None:
    round_ = without_c()
    assert whole(round_, 3, "c", step=1, now_s=15.0) == [CenterFollows(Outcome.STALE)]
    whole(round_, 4, "a", step=2, now_s=20.0)
    whole(round_, 5, "b", step=2, now_s=21.0)
    assert round_.waits_for == (frozenset("c"), 0)
    assert commit_of(whole(round_, 6, "c", step=2, now_s=22.0)).contributors == ("a", "b", "c")


def test_a_worker_that_missed_a_round_is_waited_for_once_it_asks_what_became_of_its_last_push() -> None:
    round_ = without_c()
    assert whole(round_, 3, "c", step=0, now_s=15.0) == [CenterFollows(Outcome.ALREADY_COUNTED)]
    whole(round_, 4, "a", step=2, now_s=20.0)
    whole(round_, 5, "b", step=2, now_s=21.0)
    assert round_.waits_for == (frozenset("c"), 0)


def test_a_worker_that_shows_up_while_a_round_ends_is_waited_for_in_the_next() -> None:
    round_ = without_c()
    part(round_, 3, "a", step=2, now_s=20.0)
    whole(round_, 4, "b", step=2, now_s=20.0)
    whole(round_, 5, "c", step=1, now_s=21.0)
    assert round_.waits_for == (frozenset("a"), 0), "it is too late for this round"
    assert commit_of(give(round_, 3, 1, now_s=22.0)).contributors == ("a", "b")
    whole(round_, 6, "a", step=3, now_s=23.0)
    whole(round_, 7, "b", step=3, now_s=23.0)
    assert round_.waits_for == (frozenset("c"), 0)


def test_a_push_that_comes_when_all_are_there_is_held_until_the_commit_and_then_stale() -> None:
    round_ = without_c()
    part(round_, 3, "a", step=2, now_s=20.0)
    whole(round_, 4, "b", step=2, now_s=20.0)
    assert whole(round_, 5, "c", step=2, now_s=21.0) == [Hold()]
    assert round_.holds(5)
    assert (round_.given("c"), round_.complete) == (0, frozenset("b"))
    commit = commit_of(give(round_, 3, 1, now_s=22.0))
    assert (commit.contributors, commit.held) == (("a", "b"), (5,))
    assert commit.verdicts.keys() == {3, 4}
    assert not round_.holds(5)


def test_a_held_worker_is_waited_for_in_the_next_round() -> None:
    round_ = without_c()
    part(round_, 3, "a", step=2, now_s=20.0)
    whole(round_, 4, "b", step=2, now_s=20.0)
    whole(round_, 5, "c", step=2, now_s=21.0)
    give(round_, 3, 1, now_s=22.0)
    whole(round_, 6, "a", step=3, now_s=23.0)
    whole(round_, 7, "b", step=3, now_s=23.0)
    assert round_.waits_for == (frozenset("c"), 0)
    assert commit_of(whole(round_, 8, "c", step=3, now_s=24.0)).contributors == ("a", "b", "c")


def test_held_workers_may_push_again_when_somebody_leaves_the_round() -> None:
    round_ = without_c()
    round_.open(3, push("a", number=3, step=2), 20.0)
    whole(round_, 4, "b", step=2, now_s=20.0)
    whole(round_, 5, "c", step=2, now_s=21.0)
    decisions = round_.close(3, 22.0)
    assert dismissals(decisions) == {5: Reason.ROUND_RESTARTED}
    assert whole(round_, 6, "c", step=2, now_s=23.0)[0] == Admit(0)
    assert commit_of(expire_when_due(round_, 33.0)).contributors == ("b", "c")


def test_the_round_commits_at_once_without_a_worker_that_left_before_its_first_fragment() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=1.0)
    round_.open(3, push("c", number=2, step=1), 1.0)
    assert round_.leave("c", push("c").incarnation, 3.0) == []
    commit = commit_of(round_.close(3, 3.0))
    assert (commit.contributors, set(commit.verdicts)) == (("a", "b"), {1, 2})


def test_a_new_worker_may_join_as_long_as_there_is_room() -> None:
    round_ = after_a_round("a", "b", "c", max_workers=4)
    whole(round_, 1, "d", now_s=1.0)
    whole(round_, 2, "a", now_s=1.0)
    whole(round_, 3, "b", now_s=1.0)
    assert commit_of(whole(round_, 4, "c", now_s=1.0)).contributors == ("a", "b", "c", "d")
    part(round_, 5, "a", step=2, now_s=2.0)
    for stream, worker_id in enumerate("bcd", 6):
        whole(round_, stream, worker_id, step=2, now_s=2.0)
    with pytest.raises(ConflictError, match="'e' is one too many for round 2, which has its 4 workers") as error:
        whole(round_, 9, "e", step=2, now_s=3.0)
    assert refused(error) is Reason.ROUND_FULL


def test_a_full_round_waits_for_nobody_who_has_no_place_in_it() -> None:
    round_ = after_a_round("a", "b", "c", max_workers=3)
    whole(round_, 1, "d", now_s=1.0)
    whole(round_, 2, "a", now_s=1.0)
    assert commit_of(whole(round_, 3, "b", now_s=1.0)).contributors == ("a", "b", "d")


def test_a_late_worker_that_gave_nothing_is_sent_away_and_nothing_else_changes() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=1.0)
    round_.open(3, push("c", number=2, step=1), 2.0)
    decisions = expire_when_due(round_, 11.0)
    assert dismissals(decisions) == {3: Reason.ROUND_RESTARTED}
    assert not any(isinstance(decision, Restart) for decision in decisions)
    assert commit_of(decisions).contributors == ("a", "b")
    assert whole(round_, 4, "c", now_s=12.0) == [CenterFollows(Outcome.STALE)]


def given_up(max_workers: int = 4) -> Round:
    """Of a, b and c, c was late in the middle of its push: at 11 s the round starts over without it."""
    round_ = after_a_round("a", "b", "c", max_workers=max_workers)
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=1.0)
    part(round_, 3, "c", now_s=2.0)
    decisions = expire_when_due(round_, 11.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == dict.fromkeys((1, 2, 3), Reason.ROUND_RESTARTED)
    assert round_.complete == frozenset()
    return round_


def test_a_round_starts_over_without_a_worker_that_is_late_in_the_middle_of_its_push() -> None:
    round_ = given_up()
    assert whole(round_, 4, "c", now_s=11.0) == [Hold()]
    assert whole(round_, 5, "a", now_s=12.0) == [Admit(0)]
    commit = commit_of(whole(round_, 6, "b", now_s=12.0))
    assert (commit.contributors, commit.held) == (("a", "b"), (4,))
    assert whole(round_, 7, "c", step=2, now_s=13.0) == [Admit(0)], "it had to miss one round"


def test_a_worker_that_was_given_up_stays_held_when_another_leaves_the_round() -> None:
    round_ = given_up()
    whole(round_, 4, "c", now_s=11.0)
    whole(round_, 5, "b", now_s=12.0)
    round_.open(6, push("a", number=2, step=1), 12.0)
    assert round_.close(6, 13.0) == []
    assert round_.holds(4)


def test_a_worker_that_was_given_up_is_let_in_when_the_others_do_not_come_back() -> None:
    round_ = given_up()
    whole(round_, 4, "c", now_s=11.0)
    whole(round_, 5, "a", now_s=12.0)
    assert dismissals(expire_when_due(round_, 21.0)) == {4: Reason.ROUND_RESTARTED}
    assert whole(round_, 6, "c", now_s=21.0) == [Admit(0)]
    assert commit_of(expire_when_due(round_, 31.0)).contributors == ("a", "c")


def test_a_worker_that_was_given_up_makes_nobody_push_again() -> None:
    round_ = given_up(max_workers=3)
    part(round_, 4, "b", now_s=12.0)
    round_.close(4, 12.0)
    whole(round_, 5, "d", now_s=12.0)
    round_.open(6, push("e", step=1), 12.0)
    assert whole(round_, 7, "c", now_s=13.0) == [Hold()], "b has broken off, but c may not take its place"
    assert round_.complete == {"d"}


def test_a_worker_that_was_given_up_takes_no_place_from_others() -> None:
    round_ = given_up(max_workers=3)
    whole(round_, 4, "c", now_s=12.0)
    whole(round_, 5, "d", now_s=12.0)
    whole(round_, 6, "a", now_s=12.0)
    assert commit_of(whole(round_, 7, "b", now_s=12.0)).contributors == ("a", "b", "d")


def test_nobody_is_held_for_longer_than_the_time_of_grace_because_of_a_push_that_broke_off() -> None:
    round_ = without_c()
    whole(round_, 3, "a", step=2, now_s=20.0)
    part(round_, 4, "b", step=2, now_s=20.0)
    round_.close(4, 21.0)
    assert round_.due_at_s is None, "nobody is there but a"
    assert whole(round_, 5, "c", step=2, now_s=25.0) == [Hold()]
    decisions = expire_when_due(round_, 31.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == dict.fromkeys((3, 5), Reason.ROUND_RESTARTED)
    whole(round_, 6, "c", step=2, now_s=32.0)
    assert commit_of(whole(round_, 7, "a", step=2, now_s=32.0)).contributors == ("a", "c")


def test_a_push_that_broke_off_may_come_back_while_others_are_held() -> None:
    round_ = without_c()
    whole(round_, 3, "a", step=2, now_s=20.0)
    part(round_, 4, "b", step=2, now_s=20.0)
    round_.close(4, 21.0)
    whole(round_, 5, "c", step=2, now_s=25.0)
    assert round_.open(6, push("b", number=3, step=2), 26.0) == [Admit(1)]
    assert round_.due_at_s is None
    assert commit_of(give(round_, 6, 1, now_s=27.0)).contributors == ("a", "b")


def test_the_first_push_that_broke_off_counts_for_those_who_are_held() -> None:
    round_ = after_a_round("a", "b", "c", "d", min_workers=3, max_workers=5)
    round_.leave("d", push("d").incarnation, 1.0)
    whole(round_, 1, "a", now_s=1.0)
    part(round_, 2, "c", now_s=1.0)
    part(round_, 3, "b", now_s=1.0)
    round_.close(2, 2.0)
    round_.close(3, 5.0)
    whole(round_, 4, "e", now_s=6.0)
    assert isinstance(expire_when_due(round_, 12.0)[0], Restart)
    assert round_.waits_for == (frozenset("ae"), 1), "both are given up"


def test_trying_again_does_not_make_a_held_worker_wait_for_longer() -> None:
    round_ = after_a_round("a", "b", "c", round_timeout_s=4.0)
    round_.leave("c", push("c").incarnation, 1.0)
    part(round_, 1, "a", now_s=1.0)
    part(round_, 2, "b", now_s=1.0)
    round_.close(2, 1.0)
    whole(round_, 3, "c", now_s=2.0)
    assert expire_when_due(round_, 6.0) == [TimeOut((3,), 4.0)]
    whole(round_, 4, "c", now_s=9.0)
    assert isinstance(expire_when_due(round_, 11.0)[0], Restart), "ten seconds after b broke off"


def test_a_newcomer_whose_push_was_given_up_for_others_is_waited_for() -> None:
    round_ = without_c()
    whole(round_, 3, "d", step=2, now_s=20.0)
    part(round_, 4, "a", step=2, now_s=20.0)
    assert isinstance(round_.open(5, push("a", number=9, step=2), 21.0)[1], Restart)
    give(round_, 5, 0, 1, now_s=21.0)
    whole(round_, 6, "b", step=2, now_s=22.0)
    assert round_.waits_for == (frozenset("d"), 0)
    assert commit_of(whole(round_, 7, "d", step=2, now_s=23.0)).contributors == ("a", "b", "d")


def test_a_worker_that_leaves_is_not_waited_for_from_then_on() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=1.0)
    assert commit_of(round_.leave("c", push("c").incarnation, 2.0)).contributors == ("a", "b")


def test_the_whole_push_of_a_worker_that_leaves_stays_and_the_next_round_does_not_wait_for_it() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "c", now_s=1.0)
    round_.close(1, 2.0)
    assert round_.leave("c", push("c").incarnation, 2.0) == []
    whole(round_, 2, "a", now_s=3.0)
    assert commit_of(whole(round_, 3, "b", now_s=3.0)).contributors == ("a", "b", "c")
    whole(round_, 4, "a", step=2, now_s=4.0)
    assert commit_of(whole(round_, 5, "b", step=2, now_s=4.0)).contributors == ("a", "b")


def test_a_worker_that_never_was_counted_may_leave_too() -> None:
    round_ = without_c()
    stale = push("d", process=7, step=1)
    assert round_.open(3, stale, 15.0) == [CenterFollows(Outcome.STALE)]
    whole(round_, 4, "a", step=2, now_s=20.0)
    whole(round_, 5, "b", step=2, now_s=20.0)
    assert commit_of(round_.leave("d", stale.incarnation, 21.0)).contributors == ("a", "b")


def test_a_round_starts_over_at_once_when_a_worker_leaves_in_the_middle_of_its_push() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    part(round_, 2, "c", now_s=1.0)
    round_.close(2, 2.0)
    decisions = round_.leave("c", push("c").incarnation, 2.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == {1: Reason.ROUND_RESTARTED}
    whole(round_, 3, "a", now_s=3.0)
    assert commit_of(whole(round_, 4, "b", now_s=3.0)).contributors == ("a", "b")


def test_a_goodbye_of_a_later_process_gives_up_what_the_earlier_one_began() -> None:
    round_ = after_a_round("a", "b", "c")
    part(round_, 1, "c", now_s=1.0)
    round_.close(1, 2.0)
    later = push("c", process=2, step=0)
    assert round_.open(2, later, 3.0) == [CenterFollows(Outcome.STALE)]
    assert isinstance(round_.leave("c", later.incarnation, 4.0)[0], Restart)


def test_a_goodbye_may_come_before_the_end_of_the_push_is_noticed() -> None:
    round_ = after_a_round("a", "b", "c")
    whole(round_, 1, "a", now_s=1.0)
    part(round_, 2, "c", now_s=1.0)
    assert round_.leave("c", push("c").incarnation, 2.0) == []
    decisions = round_.close(2, 2.0)
    assert isinstance(decisions[0], Restart)
    assert dismissals(decisions) == {1: Reason.ROUND_RESTARTED}
    whole(round_, 3, "a", now_s=3.0)
    assert commit_of(whole(round_, 4, "b", now_s=3.0)).contributors == ("a", "b")


def test_a_goodbye_of_an_earlier_process_changes_nothing() -> None:
    round_ = without_c()
    round_.open(3, push("c", process=2, step=1), 15.0)
    before = repr(round_)
    assert round_.leave("c", push("c", process=1).incarnation, 16.0) == []
    assert repr(round_) == before
    part(round_, 4, "c", step=2, now_s=17.0)
    round_.close(4, 17.0)
    assert round_.leave("c", push("c", process=3).incarnation, 18.0) == []
    assert round_.given("c") == 1


def test_the_push_of_a_worker_that_the_round_timeout_ended_stays_and_may_be_made_again() -> None:
    round_ = after_a_round("a", "b", "c", min_workers=3, round_timeout_s=5.0)
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=3.0)
    assert expire_when_due(round_, 6.0) == [TimeOut((1,), 5.0)]
    assert not round_.holds(1)
    assert whole(round_, 3, "a", now_s=7.0) == [Admit(2)]
    assert expire_when_due(round_, 8.0) == [TimeOut((2,), 5.0)]
    commit = commit_of(whole(round_, 4, "c", now_s=9.0))
    assert commit.contributors == ("a", "b", "c")
    assert commit.verdicts.keys() == {3, 4}
    assert whole(round_, 5, "b", now_s=10.0) == [CenterFollows(Outcome.ALREADY_COUNTED)]


def test_a_held_worker_is_told_that_the_round_lasts_too_long() -> None:
    round_ = after_a_round("a", "b", "c", max_workers=4, round_timeout_s=5.0)
    for stream, worker_id in enumerate("abc", 1):
        part(round_, stream, worker_id, now_s=1.0)
    whole(round_, 4, "d", now_s=2.0)
    assert expire_when_due(round_, 7.0) == [TimeOut((4,), 5.0)]
    assert round_.due_at_s is None, "those who have not given all are waited for, and do not wait"


def test_in_strict_mode_only_the_round_timeout_passes() -> None:
    round_ = Round(RoundPolicy.strict(2, round_timeout_s=5.0), 2)
    part(round_, 1, "a", step=0, now_s=0.0)
    assert round_.due_at_s is None
    give(round_, 1, 1, now_s=1.0)
    assert expire_when_due(round_, 6.0) == [TimeOut((1,), 5.0)]
    assert round_.due_at_s is None
    assert round_.expire(1e9) == []


def test_those_who_are_ahead_are_refused_for_the_sake_of_a_held_worker_too() -> None:
    round_ = given_up()
    whole(round_, 4, "c", now_s=11.0)
    with pytest.raises(ConflictError, match="'a' pushes from base step 9") as error:
        round_.open(5, push("a", number=9, step=9), 12.0)
    assert refused(error) is Reason.BASE_STEP_AHEAD


def test_the_time_of_grace_adapts_to_how_late_the_workers_are() -> None:
    round_ = quorum(2, 1, fragment_count=1, grace_s=None)
    for step in range(5):
        now_s = 100.0 * step
        whole(round_, 2 * step, "a", step=step, now_s=now_s)
        assert round_.due_at_s == now_s + 30.0
        commit_of(whole(round_, 2 * step + 1, "b", step=step, now_s=now_s + 3.0 + step % 2))
    whole(round_, 10, "a", step=5, now_s=500.0)
    assert round_.due_at_s == 503.0, "3, 4, 3, 4, 3 seconds late: the median is 3, and most were as late"


# For whom, and how long.


def test_until_five_late_pushes_were_seen_the_time_of_grace_is_30_s() -> None:
    lateness = Lateness()
    lateness.observe([1.0] * 4)
    assert lateness.grace_s == 30.0
    lateness.observe([1.0])
    assert lateness.grace_s == 1.0


def test_the_time_of_grace_is_the_median_and_four_times_the_median_absolute_deviation() -> None:
    lateness = Lateness()
    lateness.observe([1.0, 2.0, 3.0, 5.0, 100.0])
    assert lateness.grace_s == 3.0 + 4 * 2.0, "deviations 0, 1, 2, 2 and 97"


def test_the_time_of_grace_is_never_less_than_half_a_second() -> None:
    lateness = Lateness()
    lateness.observe([0.01] * 9)
    assert lateness.grace_s == 0.5


def test_only_the_last_200_late_pushes_matter() -> None:
    lateness = Lateness()
    lateness.observe([60.0] * 500)
    lateness.observe([2.0] * 199)
    assert lateness.grace_s == 2.0
    lateness.observe([2.0])
    assert list(lateness._recent_s) == [2.0] * 200


@given(st.lists(st.floats(0, 1e6), min_size=5, max_size=50))
@fast
def test_at_least_half_of_those_who_were_late_would_be_waited_for(late_s: list[float]) -> None:
    lateness = Lateness()
    lateness.observe(late_s)
    assert sum(value <= lateness.grace_s for value in late_s) >= len(late_s) / 2


def test_a_round_is_strict_when_it_needs_all() -> None:
    assert RoundPolicy.strict(3, round_timeout_s=9.0) == RoundPolicy(3, 3, 3, None, 9.0)
    assert RoundPolicy.strict(3).is_strict
    assert not RoundPolicy(3, 2, 3).is_strict
