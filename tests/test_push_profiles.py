"""What a push header says about how the client reads: half-duplex, combined messages, codecs; with a real server."""

from __future__ import annotations

import itertools

import pytest
from grpc import StatusCode

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of, running
from tests.raw_client import RawClient, Stream, flat_bytes, fragment, fragments_of, until

PushStream = Stream[pb.PushAndAverageResponse]


def written(job: Job, client: RawClient, worker_id: str, first: int = 0, **fields: object) -> PushStream:
    """A half-duplex push from fragment ``first`` on that has not half-closed yet."""
    stream = client.open_push()
    stream.send(job.header(worker_id, half_duplex=True, **fields))
    stream.give(fragments_of(of(1)), first)
    return stream


def kinds(stream: PushStream) -> list[list[str]]:
    """The parts of each message, until the end of the stream."""
    messages = list[pb.PushAndAverageResponse]()
    while not messages or not messages[-1].HasField("outcome"):
        messages.append(stream.receive())
    assert stream.ended()
    return [[field.name for field, _ in message.ListFields()] for message in messages]


# Half-duplex.


def test_a_half_duplex_client_writes_all_half_closes_and_reads_all(job: Job) -> None:
    opening = job.header("a", half_duplex=True)
    fragments = fragments_of(of(1))
    opening.fragment.CopyFrom(fragment(0, fragments[0]).fragment)
    a = job.client.open_push()
    a.send(opening)
    a.give(fragments, 1)
    a.half_close()
    b = job.push("b", of(3))
    for stream in (a, b):
        outcome, center = stream.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert center == flat_bytes(of(2))


def test_nothing_is_sent_to_a_half_duplex_client_before_it_has_half_closed(job: Job) -> None:
    a = written(job, job.client, "a")
    job.given("a", COUNT)
    assert job.push("b", of(3)).answer()[1] == flat_bytes(of(2))  # the round is over
    sent_bytes = job.client.status().sent_bytes
    assert sent_bytes == len(flat_bytes(CENTER)), "only b has got the center"
    a.half_close()
    outcome, center = a.answer()
    assert (outcome.outcome, outcome.global_step, center) == (pb.OUTCOME_COMMITTED, STEP + 1, flat_bytes(of(2)))
    assert job.client.status().sent_bytes == 2 * sent_bytes


def test_a_half_duplex_push_that_is_stale_is_answered_after_its_half_close(job: Job) -> None:
    a = written(job, job.client, "a", base_step=STEP - 1)
    until(lambda: job.client.status().received_bytes == 2 * len(flat_bytes(CENTER)), "the fragments are passed over")
    assert job.client.status().sent_bytes == 0
    a.half_close()
    outcome, center = a.answer()
    assert (outcome.outcome, outcome.global_step, center) == (pb.OUTCOME_STALE, STEP, flat_bytes(CENTER))


@pytest.mark.parametrize("given", [1, COUNT - 1, COUNT])
def test_a_half_duplex_retry_sends_all_and_is_counted_once(job: Job, given: int) -> None:
    job.break_off("a", of(1), given)
    a = written(job, job.client, "a")
    a.half_close()
    b = job.push("b", of(3))
    for stream in (a, b):
        outcome, center = stream.answer()
        assert (outcome.outcome, center) == (pb.OUTCOME_COMMITTED, flat_bytes(of(2)))


def test_a_half_duplex_push_that_lacks_a_fragment_is_refused(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a", half_duplex=True))
    stream.give(fragments_of(of(1)), 0, COUNT - 1)
    stream.half_close()
    assert stream.refusal().reason == "FRAGMENT_MISSING"


def test_rounds_that_go_on_keep_no_center_for_a_half_duplex_client_that_still_writes(
    start_server: StartServer,
) -> None:
    with running(start_server, RoundPolicy(2, 2, 3, grace_s=0.0)) as job:
        a = written(job, job.client, "a")
        job.given("a", COUNT)
        assert job.push("b", of(3)).answer()[1] == flat_bytes(of(2))
        # More rounds than the server would keep centers for a slow reader.
        for step in range(STEP + 1, STEP + 6):
            streams = [job.push(name, of(step), base_step=step, push_id=step) for name in "bc"]
            assert {stream.answer()[0].outcome for stream in streams} == {pb.OUTCOME_COMMITTED}
        a.half_close()
        outcome, center = a.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_ALREADY_COUNTED, STEP + 6)
        assert center == flat_bytes(of(STEP + 5))


@pytest.mark.parametrize("base_step", [STEP, STEP - 1])
def test_a_half_duplex_client_owes_its_half_close(start_server: StartServer, base_step: int) -> None:
    with running(start_server, 2, stall_timeout_s=0.5) as job:
        refusal = written(job, job.client, "a", base_step=base_step).refusal()
        assert (refusal.code, refusal.reason) == (StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED")


def test_a_half_duplex_client_that_waits_at_the_barrier_is_not_stalled(start_server: StartServer) -> None:
    with running(start_server, 2, stall_timeout_s=0.5) as job:
        a = written(job, job.client, "a")
        a.half_close()
        job.given("a", COUNT)
        stalls = written(job, job.client, "c", base_step=STEP - 1)
        assert stalls.refusal().reason == "STREAM_STALLED"  # so the time has passed
        assert job.push("b", of(3)).answer()[0].outcome == pb.OUTCOME_COMMITTED
        assert a.answer()[0].outcome == pb.OUTCOME_COMMITTED


def test_a_half_duplex_client_is_offered_nothing(start_server: StartServer) -> None:
    with running(start_server, 1, shared=True) as job:
        a = written(job, job.client, "a", accepts_shared_memory=True, accepts_data_connection=True)
        a.half_close()
        assert a.receive().admission == pb.PushAdmission()


# Combined messages.


@pytest.mark.parametrize(("follow", "half_duplex"), list(itertools.product([True, False], repeat=2)))
def test_a_message_has_one_of_admission_fragment_and_outcome(job: Job, follow: bool, half_duplex: bool) -> None:
    streams = []
    for name in "ab":
        streams.append(job.client.open_push())
        streams[-1].send(job.header(name, fragments_follow=follow, half_duplex=half_duplex))
        streams[-1].give(fragments_of(of(1)))
        streams[-1].half_close()
    for stream in streams:
        assert kinds(stream) == [["admission"], *[["fragment"]] * COUNT, ["outcome"]]


def test_a_client_may_accept_the_outcome_with_the_last_fragment(job: Job) -> None:
    streams = [job.push(name, of(1), accepts_combined=True) for name in "ab"]
    for stream in streams:
        assert kinds(stream) == [*[["fragment"]] * (COUNT - 1), ["fragment", "outcome"]]


def test_a_client_whose_fragments_follow_may_accept_the_admission_with_the_first_fragment(job: Job) -> None:
    streams = []
    for name in "ab":
        streams.append(job.client.open_push())
        streams[-1].send(job.header(name, fragments_follow=True, accepts_combined=True))
        streams[-1].give(fragments_of(of(1)))
        streams[-1].half_close()
    middle = [["fragment"]] * (COUNT - 2)
    for stream in streams:
        assert kinds(stream) == [["admission", "fragment"], *middle, ["fragment", "outcome"]]


# Codecs.


def test_a_push_by_a_codec_that_the_server_does_not_know_is_refused(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a", codec="of-the-future"))
    refusal = stream.refusal()
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "CODEC_UNKNOWN")
    assert "'of-the-future'" in refusal.message
    assert job.client.status().connected_workers == 0


def test_raw_may_be_named(job: Job) -> None:
    streams = [job.push(name, of(1), codec="raw") for name in "ab"]
    assert [stream.answer()[1] for stream in streams] == [flat_bytes(of(1))] * 2
