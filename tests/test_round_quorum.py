"""The round with a quorum: each rule by an example."""

from __future__ import annotations

import pytest

from modelaverage.errors import ConflictError, Reason
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import Admit, CenterFollows, Commit, FinishFragment, Hold, Restart, TimeOut, Verdict
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided
from tests.rounds import commit_of, dismissals, give, part, push, refused, whole

# Rules by example. Workers a, b, c: three are announced, two are enough, and the grace period is ten seconds.


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
    """The round after a first one, which these workers made at 0 s on streams below 0; a quorum is enough."""
    round_ = quorum(len(worker_ids), min_workers, max_workers, round_timeout_s=round_timeout_s)
    for number, worker_id in enumerate(worker_ids, 1):
        whole(round_, -number, worker_id, step=0, now_s=0.0)
    assert round_.contributors == worker_ids
    return round_


def expire_when_due(round_: Round, due_at_s: float) -> list[Decided]:
    assert round_.due_at_s == due_at_s
    before = repr(round_)
    assert round_.expire(due_at_s - 0.01) == []
    assert repr(round_) == before, "it came too early"
    return round_.expire(due_at_s)


def test_a_round_with_its_quorum_waits_for_the_grace_period_and_commits_with_whom_it_has() -> None:
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


def test_the_grace_period_begins_with_the_quorum_and_is_not_prolonged() -> None:
    round_ = after_a_round("a", "b", "c", "d")
    whole(round_, 1, "a", now_s=1.0)
    whole(round_, 2, "b", now_s=3.0)
    whole(round_, 3, "c", now_s=9.0)
    assert commit_of(expire_when_due(round_, 13.0)).contributors == ("a", "b", "c")


def test_the_first_round_waits_for_num_workers_and_then_for_the_grace_period() -> None:
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


def test_nobody_is_held_for_longer_than_the_grace_period_because_of_a_push_that_broke_off() -> None:
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


def test_the_grace_period_adapts_to_how_late_the_workers_are() -> None:
    round_ = quorum(2, 1, fragment_count=1, grace_s=None)
    for step in range(5):
        now_s = 100.0 * step
        whole(round_, 2 * step, "a", step=step, now_s=now_s)
        assert round_.due_at_s == now_s + 30.0
        commit_of(whole(round_, 2 * step + 1, "b", step=step, now_s=now_s + 3.0 + step % 2))
    whole(round_, 10, "a", step=5, now_s=500.0)
    assert round_.due_at_s == 503.0, "3, 4, 3, 4, 3 seconds late: the median is 3, and most were as late"
