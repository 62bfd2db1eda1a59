"""The split of a round's time, the lateness of workers, and the rate of rounds; time is an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_server.seen.observations import PHASES, Histogram, Observations, Sending
from ps_server.seen.roster import Roster, WorkerRecord


def sums(seen: Observations) -> dict[str, object]:
    return {phase: pytest.approx(seen.phase_s[phase].sum_s) for phase in PHASES}


def test_every_second_of_a_round_belongs_to_one_phase() -> None:
    seen = Observations()
    seen.admitted(1, True, 10.0)
    seen.averaged(11.0, 11.5)  # receiving 1.0
    seen.whole(1, "a", 12.0)  # receiving 0.5
    seen.admitted(2, True, 20.0)  # waiting 8.0
    seen.whole(2, "b", 23.0)  # receiving 3.0
    seen.averaged(23.0, 23.25)
    seen.committed(("a", "b"), 23.25)
    assert sums(seen) == {"waiting": 8.0, "receiving": 4.5, "averaging": 0.75, "sending": 0.0}
    assert seen.round_s.sum_s == 13.25


@given(st.lists(st.tuples(st.sampled_from(["admit", "average", "whole", "end"]), st.integers(0, 9)), max_size=30))
def test_the_phases_of_a_round_sum_up_to_the_round(events: list[tuple[str, int]]) -> None:
    seen, now_s, open_streams = Observations(), 100.0, set[int]()
    seen.admitted(0, True, now_s)
    open_streams.add(0)
    for event, stream in events:
        now_s += 1
        match event:
            case "admit":
                seen.admitted(stream, True, now_s)
                open_streams.add(stream)
            case "average":
                seen.averaged(now_s, now_s + 0.25)
                now_s += 0.25
            case "whole" if stream in open_streams:
                seen.whole(stream, str(stream), now_s)
            case "end":
                open_streams.discard(stream)
                seen.ended(stream, True, now_s)
    seen.committed((), now_s + 1)
    assert sum(seen.phase_s[phase].sum_s for phase in PHASES) == pytest.approx(seen.round_s.sum_s) == now_s + 1 - 100


def test_a_worker_is_as_late_as_its_push_was_whole_after_the_first() -> None:
    seen = Observations()
    for stream, (worker_id, at_s) in enumerate({"a": 5.0, "b": 5.5, "c": 9.0}.items()):
        seen.admitted(stream, True, 1.0)
        seen.whole(stream, worker_id, at_s)
    seen.whole(3, "a", 12.0)  # a retry of a whole push does not make the push later
    assert seen.committed(("a", "b", "c"), 12.0) == {"a": 0.0, "b": 0.5, "c": 4.0}


def test_what_a_round_took_before_it_started_over_is_forgotten() -> None:
    seen = Observations()
    seen.admitted(1, True, 0.0)
    seen.whole(1, "a", 50.0)
    seen.started_over()
    seen.ended(1, False, 60.0)
    seen.admitted(2, True, 60.0)
    seen.whole(2, "a", 61.0)
    assert seen.committed(("a",), 61.0) == {"a": 0.0}
    assert sums(seen) == {"waiting": 0.0, "receiving": 1.0, "averaging": 0.0, "sending": 0.0}


def test_a_round_that_everybody_left_has_not_begun() -> None:
    seen = Observations()
    seen.admitted(1, True, 0.0)
    seen.ended(1, False, 100.0)
    seen.admitted(2, True, 200.0)
    seen.committed(("a",), 201.0)
    assert seen.round_s.sum_s == 1.0


def test_a_round_is_sent_when_its_last_answer_has_ended_whatever_later_rounds_do() -> None:
    seen = Observations()
    first, second = Sending({1, 2}, since_s=10.0), Sending({3}, since_s=11.0)
    seen.answered(first, 1, 10.5)
    seen.answered(second, 3, 11.25)
    assert seen.phase_s["sending"].sum_s == 0.25
    seen.answered(first, 2, 14.0)
    assert (seen.phase_s["sending"].sum_s, seen.phase_s["sending"].count) == (4.25, 2)


def test_the_rate_of_rounds_falls_while_one_is_overdue() -> None:
    seen = Observations()
    assert seen.rounds_per_minute(0.0) == 0.0
    for at_s in range(100):
        seen.committed((), float(at_s))
    assert seen.rounds_per_minute(99.5) == 60.0
    assert seen.rounds_per_minute(99.0 + 30.0) == 2.0


def test_a_histogram_counts_a_duration_at_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for duration_s in (0.5, 1.0, 1.5, 2.5):
        histogram.observe(duration_s)
    assert (histogram.counts, histogram.sum_s, histogram.count) == ([2, 1, 1], 5.5, 4)


def test_a_push_is_a_retry_when_the_same_one_was_heard_of_before() -> None:
    record = WorkerRecord(0.0)
    keys = [(b"a", 1), (b"a", 1), (b"a", 2), (b"b", 2), (b"b", 2)]
    assert [record.is_retry(key) for key in keys] == [False, True, False, False, True]


def test_only_contributors_are_counted_and_their_lateness_sums_up() -> None:
    roster = Roster()
    record = roster.heard_of("a", 0.0)
    roster.count({"a": 1.0, "stranger": 2.0})
    roster.count({"a": 0.25})
    assert (record.pushes_counted, record.lateness_s, record.lateness_sum_s) == (2, 0.25, 1.25)
    assert list(roster.records) == ["a"]
