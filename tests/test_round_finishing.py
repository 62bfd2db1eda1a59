"""Rounds do not wait for a worker that has finished: each rule by an example."""

from __future__ import annotations

import pytest

from modelaverage.errors import ModelAverageError
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import CenterFollows, Commit, Restart
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.round_play import Play, Process
from tests.rounds import push

# Workers are w0 (a), w1 (b) and so on. A play also compares every event with the oracle.

STRICT = RoundPolicy.strict(3)
ONE_MORE = RoundPolicy(3, 2, 4, grace_s=1.0)


def strict() -> tuple[Play, Process, Process, Process]:
    """A strict round of three workers and two fragments."""
    play = Play(STRICT, 2, surplus=0)
    a, b, c, *_ = play.processes
    return play, a, b, c


def one_more() -> tuple[Play, Process, Process, Process, Process]:
    """A round with three announced workers, of which two are enough, and four workers that come."""
    play = Play(ONE_MORE, 1, surplus=0)
    a, b, c, d, *_ = play.processes
    return play, a, b, c, d


def all_together(play: Play, *processes: Process) -> None:
    """Pushes of all these workers; each begins before the first is whole."""
    for process in processes:
        play.push(process)
    for process in processes:
        play.give(process, play.round.fragment_count)


def contributors(play: Play) -> list[str]:
    """The contributors of every round so far, as letters."""
    assert play.surprises == []
    return ["".join("abcd"[int(name[1:])] for name in c.commit.contributors) for c in play.commits]


def test_a_worker_that_finishes_while_the_others_wait_lets_their_round_commit() -> None:
    play, a, b, c = strict()
    play.whole(a)
    play.whole(b)
    assert contributors(play) == []
    play.finish(c)
    assert contributors(play) == ["ab"]
    assert play.round.training == 2


def test_a_whole_push_of_one_that_has_finished_is_averaged() -> None:
    play, a, b, c = strict()
    play.whole(a)
    play.finish(a)
    play.whole(b)
    play.whole(c)
    assert contributors(play) == ["abc"]


def test_half_a_push_of_one_that_has_finished_starts_the_round_over_without_it() -> None:
    play, a, b, _ = strict()
    play.part(a)
    play.break_off(a)
    play.whole(b)
    decisions = play.round.finish(a.worker_id, a.incarnation, play.now_s)
    assert isinstance(decisions[0], Restart)


def test_that_one_has_finished_may_be_heard_before_its_connection_breaks() -> None:
    play, a, _, _ = strict()
    play.part(a)
    stream = a.stream
    play.finish_unnoticed(a)
    assert isinstance(play.round.close(stream, play.now_s)[0], Restart)


def test_the_grace_period_begins_when_all_announced_workers_that_are_left_have_pushed() -> None:
    play, a, b, c, d = one_more()
    all_together(play, a, b, c, d)  # the first round does not wait for d, and holds it
    all_together(play, a, b, c, d)
    assert contributors(play) == ["abc", "abcd"]
    play.finish(a)
    play.finish(b)
    play.whole(c)
    assert len(play.commits) == 2  # it waits for d, which was killed
    play.until_due()
    assert contributors(play)[-1] == "c"


def test_one_that_comes_back_counts_again() -> None:
    play, a, b, c = strict()
    play.finish(c)
    play.come_back(c)
    play.whole(a)
    play.whole(b)
    assert contributors(play) == []
    assert play.round.waits_for == (frozenset(), 1)
    play.whole(c)
    assert contributors(play) == ["abc"]


def test_what_was_enough_is_not_once_one_has_come_back() -> None:
    play, a, b, c, d = one_more()
    all_together(play, a, b, c)
    play.push(d)
    play.finish(b)
    play.finish(c)
    play.whole(a)  # and waits for d
    play.break_off(d)
    play.come_back(b)
    play.until_due()
    assert len(play.commits) == 1
    play.whole(b)  # now there are two, and d has its grace period
    assert len(play.commits) == 1
    play.until_due()
    assert contributors(play) == ["abc", "ab"]


def test_one_that_comes_back_when_a_round_is_closed_is_not_in_it() -> None:
    play, a, b, c = strict()
    play.push(a)
    play.push(b)
    play.finish(c)
    play.push(c)
    play.whole(a)
    play.whole(b)
    assert contributors(play) == ["ab"]
    assert len(play.commits[0].commit.held) == 1


def test_a_push_is_a_way_to_come_back() -> None:
    play, a, b, c = strict()
    play.finish(c)
    play.push(c)
    play.whole(a)
    play.whole(b)
    assert contributors(play) == []


def test_in_a_new_run_none_of_the_last_one_has_finished() -> None:
    play, a, b, c = strict()
    for process in (a, b, c):
        play.finish(process)
    assert play.round.job_is_over
    play.whole(a)
    assert (play.round.job_is_over, contributors(play), play.round.training) == (False, [], 3)
    play.whole(b)
    play.whole(c)
    assert contributors(play) == ["abc"]


def test_finishing_twice_changes_nothing() -> None:
    play, a, b, _ = strict()
    play.finish(a)
    play.finish_again(a)
    assert (play.round.finished, play.round.training) == (frozenset({a.worker_id}), 2)
    play.whole(b)
    assert contributors(play) == []


def test_while_another_process_of_its_name_pushes_a_worker_has_not_finished() -> None:
    play, a, _, _ = strict()
    play.push(a)
    assert play.round.finish(a.worker_id, b"an earlier one..", 0.0) == []
    assert play.round.finished == frozenset()


def test_a_goodbye_without_having_finished_changes_nothing_for_a_strict_round() -> None:
    play, a, b, c = strict()
    play.whole(a)
    play.whole(b)
    play.leave(c)
    assert contributors(play) == []
    assert play.round.waits_for == (frozenset(), 1)


def test_with_a_quorum_as_many_are_enough_as_are_left() -> None:
    play = Play(RoundPolicy(4, 3, 4, grace_s=1.0), 1, surplus=0)
    a, b, c, d, *_ = play.processes
    for process in (a, b, c, d):
        play.whole(process)
    play.finish(a)
    play.finish(b)
    play.whole(c)
    play.whole(d)
    assert contributors(play) == ["abcd", "cd"]
    play.finish(c)
    play.whole(d)
    assert contributors(play)[-1] == "d"


def test_with_more_workers_than_were_announced_the_job_is_over_once_the_last_of_them_has_finished() -> None:
    play = Play(RoundPolicy(2, 1, 3, grace_s=1.0), 1, surplus=0)
    a, b, c, *_ = play.processes
    all_together(play, a, b, c)  # the first round does not know of c yet
    all_together(play, a, b, c)
    assert contributors(play) == ["ab", "abc"]
    play.finish(a)
    play.finish(b)
    assert (play.round.job_is_over, play.round.training) == (False, 1)
    play.finish(c)
    assert (play.round.job_is_over, play.round.training) == (True, 0)


def test_a_server_that_comes_back_from_a_checkpoint_knows_who_has_finished() -> None:
    round_ = Round(RoundPolicy.strict(2), 0, 7, finished=frozenset({"b"}))
    (_, commit) = round_.open(1, push("a", step=7), 0.0)
    assert isinstance(commit, Commit)
    assert commit.contributors == ("a",)


def test_a_stale_push_is_one_of_a_worker_that_trains() -> None:
    round_ = Round(RoundPolicy.strict(2), 0, 7, finished=frozenset({"b"}))
    assert round_.open(1, push("b", step=6), 0.0) == [CenterFollows(Outcome.STALE)]
    assert round_.finished == frozenset()


def test_a_refused_push_does_not_bring_its_worker_back() -> None:
    round_ = Round(RoundPolicy.strict(2), 1, finished=frozenset({"b"}))
    for stream, name in enumerate("ac"):
        round_.open(stream, push(name), 0.0)
    with pytest.raises(ModelAverageError, match="one too many"):
        round_.open(2, push("b"), 0.0)
    assert round_.finished == {"b"}
