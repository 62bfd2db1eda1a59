"""What is kept of past rounds, against one simple oracle that keeps everything."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ps_server.seen.history import DETAILED_ROUNDS, MAX_ENTRIES, MAX_PUSHES, History, Thinned
from ps_server.seen.marks import MAX_MARKS_A_KIND, MarkKind
from ps_server.seen.observations import RoundTimes
from ps_server.seen.past_round import NO_LOSSES, Losses, PastRound
from ps_server.seen.traffic import Moved, Traffic

KEPT_ROUNDS = 10_000


def past_round(step: int, loss: float | None = None) -> PastRound:
    """A round of one second that moves one byte."""
    losses = NO_LOSSES if loss is None else Losses.of([loss])
    return PastRound(
        step, step, 1, step, step + 0.5, 0.5, 0.25, 0.125, 0.125, Moved(1, 2, 3, 4), losses, 1, has_detail=True
    )


@settings(deadline=None, max_examples=30)
@given(
    rounds=st.integers(0, 4 * DETAILED_ROUNDS) | st.integers(0, KEPT_ROUNDS // 2),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    losses=st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=7),
)
def test_nothing_is_lost_while_rounds_are_joined(
    rounds: int, gaps: Sequence[int], losses: Sequence[float | None]
) -> None:
    thinned, everything, step = Thinned(), list[PastRound](), 0
    for number in range(rounds):
        step += gaps[number % len(gaps)]  # a restore may jump
        everything.append(past_round(step, losses[number % len(losses)]))
        thinned.add(everything[-1])
    entries = thinned.entries()
    assert list(entries[-DETAILED_ROUNDS:]) == everything[-DETAILED_ROUNDS:]
    assert not any(entry.has_detail for entry in entries[:-DETAILED_ROUNDS])
    rest = everything
    for entry in entries:
        joined, rest = rest[: entry.rounds], rest[entry.rounds :]
        assert (entry.step, entry.last_step) == (joined[0].step, joined[-1].step)
        assert (entry.began_at_s, entry.committed_at_s) == (joined[0].began_at_s, joined[-1].committed_at_s)
        for name in ("took_s", "waiting_s", "receiving_s", "averaging_s", "nonfinite_values"):
            assert getattr(entry, name) == sum(getattr(one, name) for one in joined)
        assert entry.moved == Moved(*(factor * len(joined) for factor in (1, 2, 3, 4)))
        told = [one.losses.total for one in joined if one.losses.told]
        assert entry.losses.told == len(told)
        assert math.isclose(entry.losses.total, sum(told), abs_tol=1e-6)
        if told:
            assert (entry.losses.least, entry.losses.most) == (min(told), max(told))
    assert rest == []


def test_ten_thousand_rounds_are_kept_in_a_thousand_entries_the_older_the_coarser() -> None:
    thinned = Thinned()
    most = 0
    for step in range(3 * KEPT_ROUNDS):
        thinned.add(past_round(step))
        if step % 97 == 0:
            most = max(most, len(thinned.entries()))
    entries = thinned.entries()
    assert most <= MAX_ENTRIES < 1010
    assert sum(entry.rounds for entry in entries) >= KEPT_ROUNDS
    assert entries[-1].step == 3 * KEPT_ROUNDS - 1
    counts = [entry.rounds for entry in entries]
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {1, 2, 4, 8, 16, 32}
    for one, next_one in pairwise(entries):
        assert one.last_step + 1 == next_one.step
    assert thinned.detailed_from == 3 * KEPT_ROUNDS - DETAILED_ROUNDS


@given(st.lists(st.floats() | st.just(math.nan), max_size=20))
def test_losses_that_are_not_finite_do_not_hide_the_others(losses: Sequence[float]) -> None:
    found = Losses.of(losses)
    numbers = [loss for loss in losses if not math.isnan(loss)]
    assert found.told == len(losses)
    if numbers:
        assert (found.least, found.most) == (min(numbers), max(numbers))
    else:
        assert math.isnan(found.least)
        assert math.isnan(found.most)


def a_round(history: History, step: int, names: Sequence[str], now_s: float) -> None:
    for name in names:
        history.admitted(name, b"process", step, 1.0, now_s)
        history.whole(name, now_s)
    history.committed(step + 1, names, {}, (), RoundTimes(now_s), now_s)


def test_a_round_tells_when_each_push_came_and_what_it_brought() -> None:
    traffic = Traffic()
    history = History(traffic)
    history.begun(7, False, 0.0)
    history.admitted("a", b"1", 70, 0.5, now_s=10.0)
    history.whole("a", now_s=10.25)
    history.admitted("b", b"1", 71, None, now_s=11.0)
    history.whole("b", now_s=11.5)
    traffic.received_bytes, traffic.sent_raw_bytes = 100, 50
    history.committed(8, ["b", "a"], {"b": 3}, ["c"], RoundTimes(10.0, 1.0, 0.5, 0.5), now_s=12.0)
    (one,) = history.seen().rounds
    assert (one.step, one.rounds, one.took_s, one.waiting_s, one.without) == (7, 1, 2.0, 1.0, ("c",))
    assert [(push.worker_id, push.pushed_s, push.whole_s, push.loss, push.local_step) for push in one.pushes] == [
        ("a", 0.0, 0.25, 0.5, 70),
        ("b", 1.0, 1.5, None, 71),
    ]
    assert [push.nonfinite_values for push in one.pushes] == [0, 3]
    assert (one.nonfinite_values, one.losses) == (3, Losses(1, 0.5, 0.5, 0.5))
    assert one.moved == Moved(received_bytes=100, sent_raw_bytes=50)
    traffic.received_bytes = 130
    a_round(history, 8, ["a", "b"], 13.0)
    assert history.seen().rounds[-1].moved == Moved(received_bytes=30)


def test_a_retry_keeps_the_time_of_the_first_try_and_another_process_does_not() -> None:
    history = History(Traffic())
    history.admitted("a", b"1", 1, None, now_s=1.0)
    history.admitted("a", b"1", 1, None, now_s=2.0)
    history.admitted("b", b"1", 1, None, now_s=1.5)
    history.admitted("b", b"2", 1, None, now_s=3.0)
    history.committed(1, ["a", "b"], {}, (), RoundTimes(1.0), now_s=4.0)
    (one,) = history.seen().rounds
    assert [push.pushed_s for push in one.pushes] == [0.0, 2.0]


def test_pushes_of_a_round_that_starts_over_are_forgotten() -> None:
    history = History(Traffic())
    history.admitted("a", b"1", 1, 5.0, now_s=1.0)
    history.admitted("b", b"1", 1, 5.0, now_s=1.0)
    history.withdrawn("b")
    history.withdrawn("stranger")
    assert list(history._arrivals) == ["a"]
    history.discarded()
    history.admitted("a", b"1", 1, 7.0, now_s=3.0)
    history.committed(1, ["a"], {}, (), RoundTimes(3.0), now_s=4.0)
    (one,) = history.seen().rounds
    assert (one.pushes[0].pushed_s, one.pushes[0].loss) == (0.0, 7.0)


def test_of_many_workers_the_first_by_name_are_kept_and_all_are_counted() -> None:
    history = History(Traffic())
    names = [f"worker-{number}" for number in range(1000)]
    a_round(history, 0, names, 1.0)
    (one,) = history.seen().rounds
    assert [push.worker_id for push in one.pushes] == names[:MAX_PUSHES]
    assert one.pushes_omitted == 1000 - MAX_PUSHES
    assert (one.losses.told, one.losses.total) == (1000, 1000.0)


def test_frequent_marks_do_not_displace_rare_ones() -> None:
    history = History(Traffic())
    history.begun(3, True, 0.0)
    history.mark(MarkKind.LEFT, 3, 1.0, "a")
    for step in range(10 * MAX_MARKS_A_KIND):
        history.checkpointed(step, 2.0 + step)
        history.checkpointed(step, 2.5 + step)  # the same one
    marks = history.seen().marks
    assert [mark.kind for mark in marks[:3]] == [MarkKind.RESTORED, MarkKind.LEFT, MarkKind.CHECKPOINT]
    assert [mark.number for mark in marks] == sorted({mark.number for mark in marks})
    assert len(marks) == 2 + MAX_MARKS_A_KIND
    assert marks[-1].step == 10 * MAX_MARKS_A_KIND - 1
    assert history.seen().is_restored
    assert history.seen().first_step == 3


def traced_bytes(play: Callable[[], None]) -> int:
    """How much memory that is allocated meanwhile stays in use."""
    tracemalloc.start()
    try:
        play()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_over_100_000_rounds() -> None:
    thinned, template = Thinned(), past_round(0)

    def play(first: int, end: int) -> None:
        for step in range(first, end):
            thinned.add(template._replace(step=step, last_step=step))

    traced_from = 100_000 - KEPT_ROUNDS - 1000
    for _ in range(traced_from):
        thinned.add(template)
    # Everything that is kept at the end is allocated meanwhile.
    assert traced_bytes(lambda: play(traced_from, 100_000)) < 2**20
    assert len(thinned.entries()) <= MAX_ENTRIES


def test_many_workers_with_long_names_take_bounded_memory() -> None:
    history = History(Traffic())

    def play() -> None:
        for step in range(DETAILED_ROUNDS + 50):
            # Other names in each round: a client invents them.
            a_round(history, step, [f"{step}-{number}-{'x' * 110}" for number in range(2 * MAX_PUSHES)], float(step))
            history.mark(MarkKind.STALE, step, 0.0, f"{step}-{'x' * 110}")

    assert traced_bytes(play) < 8 * 2**20
