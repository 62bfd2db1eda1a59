"""The shell's rules, with a real server: what goes over the wire when."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode

from ma_client import Outcome
from modelaverage.errors import Reason, refusal
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.center.center import MAX_OLD_BUFFERS, Center
from tests.conftest import StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of, running, worker
from tests.raw_client import (
    FRAGMENT_SIZE_BYTES,
    Arrays,
    RawClient,
    flat_bytes,
    fragment,
    fragments_of,
    initialize_header,
    manifest_of,
    push_header,
    rest_of_center,
    until,
)

# The round.


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_a_round_gives_the_average_of_all_workers(start_server: StartServer, num_workers: int) -> None:
    generator = np.random.default_rng(num_workers)
    # Small whole numbers add up exactly in any order, so that the average is one number, to the bit.
    pushed = [
        {name: generator.integers(-99, 99, value.shape).astype(value.dtype) for name, value in CENTER.items()}
        for _ in range(num_workers)
    ]
    with running(start_server, num_workers) as job:
        streams = [job.push(f"worker-{number}", arrays) for number, arrays in enumerate(pushed)]
        answers = [stream.answer() for stream in streams]
        center = job.center()
    average = {}
    for name, value in CENTER.items():
        sums = np.sum([arrays[name].astype(np.float64) for arrays in pushed], axis=0)
        precision = np.float64 if value.dtype == np.float64 else np.float32
        average[name] = (sums.astype(precision) / precision(num_workers)).astype(value.dtype)
    assert center == flat_bytes(average)
    for outcome, came in answers:
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert list(outcome.contributors) == [f"worker-{number}" for number in range(num_workers)]
        assert came == center


def test_a_weight_is_a_share_of_the_average(job: Job) -> None:
    streams = [job.push("a", of(1), weight=3.0), job.push("b", of(5))]  # an absent weight is 1
    assert [stream.answer()[1] for stream in streams] == [flat_bytes(of(2))] * 2


def test_a_fragment_that_cannot_be_added_starts_the_round_over_whatever_the_reason(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, failures = Center.accumulate, [refusal(Reason.FRAGMENT_SIZE_WRONG, "too late to refuse it")]

    def broken(self: Center, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return accumulate(self, *arguments)

    monkeypatch.setattr(Center, "accumulate", broken)
    stream, _ = job.admitted("a")
    stream.give(fragments_of(of(9)))
    assert stream.refusal().reason == "SERVER_OVERLOADED"
    streams = [job.push("a", of(1)), job.push("b", of(3))]
    assert [stream.answer()[1] for stream in streams] == [flat_bytes(of(2))] * 2


def test_a_variable_that_nobody_touched_keeps_the_centers_bytes(job: Job) -> None:
    streams = [
        job.push("a", of(1), untouched_variables=[0, 2]),
        job.push("b", of(3), untouched_variables=[2, 3]),
    ]
    for stream in streams:
        outcome, center = stream.answer()
        assert list(outcome.untouched_variables) == [2]
        assert center == flat_bytes({**of(2), "scale": CENTER["scale"]})


def test_a_model_without_elements_makes_rounds(start_server: StartServer) -> None:
    empty: Arrays = {"nothing": np.zeros((0, 3), np.float32)}
    with RawClient(start_server(2).address) as client:
        manifest_id = client.initialize(empty).manifest_id
        streams = [client.open_push(), client.open_push()]
        for stream, worker_id in zip(streams, "ab", strict=True):
            stream.push(push_header(manifest_id, worker_id), empty)
        for stream in streams:
            outcome, center = stream.answer()
            assert (outcome.outcome, outcome.global_step, center) == (pb.OUTCOME_COMMITTED, 1, b"")


def test_a_finished_fragment_comes_down_while_later_ones_go_up(job: Job) -> None:
    a = job.push("a", of(1))
    b, _ = job.admitted("b")
    pushed, average = fragments_of(of(3)), fragments_of(of(2))
    for index in range(COUNT):
        b.give(pushed, index, index + 1)
        # Nothing beyond this fragment has been sent by b.
        for stream in (a, b):
            message = stream.receive()
            assert (message.fragment.index, message.fragment.data) == (index, average[index])
    for stream in (a, b):
        assert stream.receive().outcome.outcome == pb.OUTCOME_COMMITTED
        assert stream.ended()


def test_a_push_whose_fragments_follow_its_header_needs_no_admission(job: Job) -> None:
    fragments = fragments_of(of(1))
    eager = job.header("a", fragments_follow=True)
    eager.fragment.CopyFrom(fragment(0, fragments[0]).fragment)
    a = job.client.open_push()
    a.send(eager)
    a.give(fragments, 1)
    a.half_close()
    b = job.push("b", of(3))
    for stream in (a, b):
        outcome, center = stream.answer()
        assert outcome.outcome == pb.OUTCOME_COMMITTED
        assert center == flat_bytes(of(2))


@pytest.mark.parametrize("given", [1, COUNT - 1, COUNT])
def test_following_fragments_that_the_server_has_already_are_ignored(job: Job, given: int) -> None:
    job.break_off("a", of(1), given)
    a = job.client.open_push()
    a.send(job.header("a", fragments_follow=True))
    a.give(fragments_of(of(1)))
    a.half_close()
    b = job.push("b", of(3))
    for stream in (a, b):
        assert stream.answer()[1] == flat_bytes(of(2))


def test_following_fragments_of_a_stale_push_are_ignored(job: Job) -> None:
    a = job.client.open_push()
    a.send(job.header("a", base_step=STEP - 1, fragments_follow=True))
    a.give(fragments_of(of(7)))
    a.half_close()
    assert a.answer()[0].outcome == pb.OUTCOME_STALE
    assert job.client.pull()[1] == flat_bytes(CENTER)


@pytest.mark.parametrize("given", [0, 1, COUNT - 1, COUNT])
def test_a_retry_of_a_broken_push_is_asked_only_for_what_is_missing(job: Job, given: int) -> None:
    job.break_off("a", of(1), given)
    retry, first = job.admitted("a")
    assert first == given
    retry.give(fragments_of(of(1)), first)
    retry.half_close()
    other = job.push("b", of(3))
    for stream in (retry, other):
        outcome, center = stream.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert center == flat_bytes(of(2))
    assert job.client.status().rounds_restarted == 0


def test_a_newer_call_of_the_same_push_takes_the_older_ones_place(job: Job) -> None:
    older, _ = job.admitted("a")
    older.give(fragments_of(of(1)), 0, 2)
    job.given("a", 2)
    newer, first = job.admitted("a")
    assert first == 2
    refusal = older.refusal()
    assert (refusal.code, refusal.reason) == (StatusCode.ABORTED, "PUSH_SUPERSEDED")
    newer.give(fragments_of(of(1)), first)
    other = job.push("b", of(3))
    assert newer.answer()[1] == other.answer()[1] == flat_bytes(of(2))


def test_a_push_whose_answer_was_lost_is_already_counted(job: Job) -> None:
    job.break_off("a", of(1), COUNT)
    other = job.push("b", of(3))
    assert other.answer()[0].outcome == pb.OUTCOME_COMMITTED
    retry, first = job.admitted("a")
    assert first == COUNT
    outcome, center = retry.answer()
    assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_ALREADY_COUNTED, STEP + 1)
    assert list(outcome.contributors) == ["a", "b"]
    assert center == flat_bytes(of(2))
    assert job.client.status().phase == pb.PHASE_IDLE


@pytest.mark.parametrize("base_step", [0, STEP - 1])
def test_a_stale_push_changes_nothing_and_gets_the_center(job: Job, base_step: int) -> None:
    waiting = job.push("b", of(3))
    stale, first = job.admitted("a", base_step=base_step)
    assert first == COUNT
    outcome, center = stale.answer()
    assert (outcome.outcome, outcome.global_step, outcome.waited_s) == (pb.OUTCOME_STALE, STEP, 0)
    assert list(outcome.contributors) == []
    assert center == flat_bytes(CENTER)
    assert job.client.status().stale_pushes == 1
    fresh = job.push("a", of(1), push_id=2)
    assert waiting.answer()[1] == fresh.answer()[1] == flat_bytes(of(2))


def test_a_stale_session_goes_on_from_the_center_that_it_is_given(job: Job) -> None:
    with worker(job.address, "a") as session:
        session.pull()
        for stream in [job.push("b", of(3)), job.push("c", of(5))]:
            stream.answer()
        result = session.push_and_average(of(1))
        assert (result.outcome, result.global_step) == (Outcome.STALE, STEP + 1)
        assert result.contributors == ("b", "c")
        assert flat_bytes(result.center) == flat_bytes(of(4))
        assert session.base_step == STEP + 1


def test_a_restarted_worker_is_counted_once(job: Job) -> None:
    job.break_off("a", of(1), COUNT)
    restarted, first = job.restarted("a")
    assert first == COUNT
    restarted.half_close()
    other = job.push("b", of(3))
    outcomes = [stream.answer() for stream in (restarted, other)]
    # The push of the old process was whole, so it stays.
    assert [outcome.outcome for outcome, _ in outcomes] == [pb.OUTCOME_ALREADY_COUNTED, pb.OUTCOME_COMMITTED]
    for outcome, center in outcomes:
        assert list(outcome.contributors) == ["a", "b"]
        assert center == flat_bytes(of(2))


def test_an_abandoned_half_of_a_push_starts_the_round_over(job: Job) -> None:
    job.break_off("a", of(99), 2)
    other = job.push("b", of(3))
    job.given("b", COUNT)
    restarted, first = job.restarted("a")
    assert first == 0
    refusal = other.refusal()
    assert (refusal.code, refusal.reason) == (StatusCode.ABORTED, "ROUND_RESTARTED")
    assert "'a'" in refusal.message
    again, first = job.admitted("b")
    assert first == 0
    for stream, arrays in ((restarted, of(1)), (again, of(3))):
        stream.give(fragments_of(arrays))
        stream.half_close()
    for stream in (restarted, again):
        outcome, center = stream.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert center == flat_bytes(of(2))
    assert job.client.status().rounds_restarted == 1


def test_a_session_pushes_again_when_the_round_starts_over(job: Job) -> None:
    job.break_off("a", of(99), 2)
    with worker(job.address, "b") as session, ThreadPoolExecutor() as pool:
        session.pull()
        # Two fragments of the void average have come down to it already.
        pushing = pool.submit(session.push_and_average, of(3), timeout_s=20)
        job.given("b", COUNT)
        restarted, _ = job.restarted("a")
        restarted.give(fragments_of(of(1)))
        result = pushing.result()
    assert (result.outcome, result.global_step, result.contributors) == (Outcome.COMMITTED, STEP + 1, ("a", "b"))
    assert flat_bytes(result.center) == flat_bytes(of(2))
    assert restarted.answer()[1] == flat_bytes(of(2))


# Initialization and pulls.


def test_a_second_initialize_is_told_the_step_that_the_job_has_reached(job: Job) -> None:
    for stream in [job.push("a", of(1)), job.push("b", of(3))]:
        stream.answer()
    again = job.client.open_initialize()
    again.send(initialize_header(manifest_of(CENTER), global_step=100))  # answered without any fragment
    answer = again.receive()
    assert (answer.initialized, answer.global_step) == (False, STEP + 1)
    assert (answer.manifest_id, answer.num_workers) == (job.manifest_id, 2)
    assert job.center() == flat_bytes(of(2))


def test_of_two_chiefs_at_once_one_initializes(start_server: StartServer) -> None:
    with RawClient(start_server(1).address) as client:
        streams = {value: client.open_initialize() for value in (1, 2)}
        for value, stream in streams.items():
            stream.send(initialize_header(manifest_of(CENTER), f"chief-{value}", global_step=value))
            stream.give(fragments_of(of(value)), 0, 1)
        until(lambda: client.status().received_bytes == 2 * FRAGMENT_SIZE_BYTES, "both have begun")
        for value, stream in streams.items():
            stream.give(fragments_of(of(value)), 1)
            stream.half_close()
        answers = {value: stream.receive() for value, stream in streams.items()}
        (first,) = [value for value, answer in answers.items() if answer.initialized]
        assert {answer.global_step for answer in answers.values()} == {first}
        header, center = client.pull()
        assert (header.global_step, center) == (first, flat_bytes(of(first)))


def test_a_pull_without_waiting_is_refused_before_initialization(start_server: StartServer) -> None:
    with RawClient(start_server(1).address) as client:
        stream = client.open_pull()
        stream.send(pb.PullRequest(worker_id="a"))
        stream.half_close()
        refusal = stream.refusal()
        assert (refusal.code, refusal.reason) == (StatusCode.FAILED_PRECONDITION, "NOT_INITIALIZED")


def test_a_pull_that_waits_gets_the_center_once_the_chief_has_set_it(start_server: StartServer) -> None:
    with RawClient(start_server(1).address) as client:
        stream = client.open_pull()
        stream.send(pb.PullRequest(worker_id="early", wait_initialized=True))
        stream.half_close()
        until(lambda: client.worker("early").worker_id == "early", "the pull waits")
        manifest_id = client.initialize(CENTER, STEP).manifest_id
        header = stream.receive().header
        assert (header.global_step, header.manifest_id, header.num_workers) == (STEP, manifest_id, 1)
        assert header.manifest == manifest_of(CENTER)
        assert rest_of_center(stream) == flat_bytes(CENTER)


def test_a_slow_puller_sees_one_steps_center_while_rounds_commit(start_server: StartServer) -> None:
    # Large enough that most of it is still unread in the server's buffers when the rounds commit.
    size = 1 << 20
    models = [{"w": np.full(4 << 20, value, np.float32)} for value in range(4)]
    with RawClient(start_server(1).address) as client:
        manifest_id = client.initialize(models[0], fragment_size_bytes=size).manifest_id
        pulls = []
        for step in range(3):
            if step < MAX_OLD_BUFFERS:
                pull = client.open_pull()
                pull.send(pb.PullRequest(worker_id=f"slow-{step}"))
                pull.half_close()
                assert pull.receive().header.global_step == step
                pulls.append(pull)
            push = client.open_push()
            push.send(push_header(manifest_id, "a", base_step=step, push_id=step))
            push.give(fragments_of(models[step + 1], size), push.admission())
            assert push.answer()[0].global_step == step + 1
        for model, pull in zip(models, pulls, strict=False):
            assert rest_of_center(pull) == flat_bytes(model)


# The status.


def test_status_tells_that_there_is_no_center(start_server: StartServer) -> None:
    with RawClient(start_server(2).address) as client:
        status = client.status()
    assert (status.phase, status.global_step, status.num_workers) == (pb.PHASE_UNINITIALIZED, 0, 2)
    assert (status.manifest_id, status.model_size_bytes, list(status.workers)) == ("", 0, [])


def test_status_tells_whom_the_round_waits_for(start_server: StartServer) -> None:
    with running(start_server, 4) as job:
        assert job.client.status().phase == pb.PHASE_IDLE
        whole = job.push("a", of(1), local_step=40, is_chief=True)
        half, _ = job.admitted("b", local_step=39)
        half.give(fragments_of(of(1)), 0, 2)
        job.given("a", COUNT)
        job.given("b", 2)
        status = job.client.status()
        assert (status.phase, status.global_step) == (pb.PHASE_AVERAGING, STEP)
        # The chief that initialized has another name here; it has not pushed.
        assert list(status.waiting_for) == ["b", "chief"]
        assert status.waiting_for_unknown == 1
        assert status.round_age_s > 0
        a, b = job.client.worker("a"), job.client.worker("b")
        assert (a.waiting, a.is_chief, a.local_step, a.fragments_given) == (True, True, 40, COUNT)
        assert (b.waiting, b.is_chief, b.local_step, b.fragments_given) == (False, False, 39, 2)
        assert [w.worker_id for w in status.workers] == ["a", "b", "chief"]
        half.give(fragments_of(of(1)), 2)
        others = [job.push("chief", of(1)), job.push("d", of(1))]
        for stream in (whole, half, *others):
            assert stream.answer()[0].waited_s >= 0
        status = job.client.status()
        assert (status.phase, list(status.waiting_for), status.waiting_for_unknown) == (pb.PHASE_IDLE, [], 0)
        assert status.last_round_s > 0
        assert [w.pushes_counted for w in status.workers] == [1, 1, 1, 1]


def test_a_refused_push_changes_nothing_in_the_status(job: Job) -> None:
    streams = [job.admitted(worker_id, local_step=7)[0] for worker_id in ("a", "b")]
    before = job.client.status()
    refused = [
        job.header("a", incarnation=b"another process!", local_step=99, is_chief=True),
        job.header("third", local_step=99),
    ]
    for header in refused:
        stream = job.client.open_push()
        stream.send(header)
        assert stream.refusal().reason in ("WORKER_ID_IN_USE", "ROUND_FULL")
    after = job.client.status()
    for status in (before, after):
        for record in status.workers:
            record.last_seen_age_s = 0
    assert list(after.workers) == list(before.workers)
    assert after.waiting_for == before.waiting_for
    for stream in streams:
        stream.cancel()


def test_status_counts_bytes(job: Job) -> None:
    model = sum(value.nbytes for value in CENTER.values())
    flat = len(flat_bytes(CENTER))
    status = job.client.status()
    assert (status.model_size_bytes, status.received_bytes, status.sent_bytes) == (model, flat, 0)
    for stream in [job.push("a", of(1)), job.push("b", of(1))]:
        stream.answer()
    job.client.pull()
    status = job.client.status()
    assert (status.received_bytes, status.sent_bytes) == (3 * flat, 3 * flat)


def test_values_that_are_not_finite_are_averaged_and_counted(job: Job) -> None:
    bad = {name: value.copy() for name, value in of(1).items()}
    bad["w"][[0, 39]] = np.nan, np.inf
    bad["half"][1, 1] = -np.inf
    bad["brain"][30] = np.nan
    streams = [job.push("a", bad), job.push("b", of(1))]
    with np.errstate(invalid="ignore"):
        average = {name: (bad[name] + value) / value.dtype.type(2) for name, value in of(1).items()}
    for stream in streams:
        assert stream.answer()[1] == flat_bytes(average)
    assert (job.client.worker("a").nonfinite_values, job.client.worker("b").nonfinite_values) == (4, 0)


def test_the_status_command_shows_the_round(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {name: value.copy() for name, value in of(1).items()}
    bad["w"][0] = np.nan
    stream = job.push("a", bad, local_step=40)
    job.given("a", COUNT)
    assert main(["status", job.address]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for shown in ("averaging", "global_step", str(STEP), "waiting for", "chief", " a ", "40", "not finite"):
        assert shown in printed.out
    assert main(["status", job.address, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["phase"] == "PHASE_AVERAGING"
    assert int(status["global_step"]) == STEP
    assert status["waiting_for"] == ["chief"]
    assert status["manifest_id"] == job.manifest_id
    assert status["workers"][0]["waiting"] is True
    stream.cancel()


def test_before_the_values_have_come_the_center_takes_no_memory(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[object]()
    monkeypatch.setattr(Center, "__init__", lambda *arguments, **_: made.append(arguments))
    with RawClient(start_server(1).address) as client:
        stream = client.open_initialize()
        stream.send(initialize_header(manifest_of(CENTER)))
        stream.give(fragments_of(CENTER), 0, COUNT - 1)
        until(lambda: client.status().received_bytes == (COUNT - 1) * FRAGMENT_SIZE_BYTES, "all but one came")
        assert made == []
