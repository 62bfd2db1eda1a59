"""Streams that break off or stall in the middle change nothing and hold up nobody."""

from __future__ import annotations

import numpy as np
from grpc import StatusCode

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.bad_input.guarded import AVERAGE, CENTER, FRAGMENTS, STEP, A, B, Job, assert_refused, running
from tests.conftest import StartServer
from tests.raw_client import RawClient, flat_bytes, fragment, fragments_of, initialize_header, manifest_of, until


def test_an_initialize_that_breaks_off_leaves_the_server_uninitialized(bare: Job) -> None:
    with RawClient(bare.address) as client:
        stream = client.open_initialize()
        stream.send(initialize_header(manifest_of(CENTER)))
        stream.give(FRAGMENTS, end=2)
        until(lambda: bare.client.status().received_bytes == 128, "two fragments came")
        stream.cancel()
    bare.assert_still_serves()


def test_a_push_that_breaks_off_is_asked_for_the_rest(job: Job) -> None:
    with RawClient(job.address) as client:
        stream = client.open_push()
        stream.send(job.header())
        stream.give(FRAGMENTS, end=2)
        until(lambda: job.client.worker("a").fragments_given == 2, "two fragments came")
        stream.cancel()
    job.assert_still_serves()


def test_an_initialize_that_stalls_anywhere_is_ended(impatient: Job) -> None:
    header = initialize_header(manifest_of(CENTER))
    streams = [impatient.client.open_initialize() for _ in range(4)]  # the first one sends nothing at all
    streams[1].send(header)
    streams[2].send(header, fragment(0, FRAGMENTS[0]))
    streams[3].send(header)
    streams[3].give(FRAGMENTS)  # all of them, but the stream stays open
    for stream in streams:
        assert_refused(stream, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
    impatient.assert_still_serves()


def test_a_push_that_stalls_anywhere_is_ended(impatient: Job) -> None:
    impatient.initialize()
    streams = [impatient.open_push(), impatient.admitted("a"), impatient.admitted("b")]
    streams[1].give(FRAGMENTS, end=2)
    for stream in streams:
        assert_refused(stream, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
    impatient.assert_still_serves()


def test_waiting_at_the_barrier_is_no_stall(impatient: Job) -> None:
    impatient.initialize()
    first = impatient.client.open_push()
    first.push(impatient.header(), A)
    # A call that began later and does stall shows that the time has passed.
    assert_refused(impatient.open_push(), StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED")
    second = impatient.client.open_push()
    second.push(impatient.header("b"), B)
    assert first.answer()[1] == second.answer()[1] == flat_bytes(AVERAGE)


def test_a_client_that_does_not_read_holds_up_nobody_but_itself(start_server: StartServer) -> None:
    # Too large for what gRPC buffers for a slow reader.
    model = {"w": np.zeros(4 << 20, np.float32)}
    size = 1 << 20
    whole = fragments_of(model, size)
    with running(start_server, stall_timeout_s=1.0) as job, RawClient(job.address) as lazy:
        job.manifest_id = job.client.initialize(model, STEP, size).manifest_id
        pull = lazy.open_pull()
        pull.send(pb.PullRequest(worker_id="reader"))
        pull.half_close()
        silent = lazy.open_push()
        silent.send(job.header("a"))
        assert silent.admission() == 0
        silent.give(whole)
        silent.half_close()
        other = job.admitted("b")
        other.give(whole)
        other.half_close()
        outcome, center = other.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert list(outcome.contributors) == ["a", "b"]
        assert center == b"".join(whole)
        # A call that began later and stalls shows that the time has passed.
        assert_refused(job.open_push(), StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED")
        assert_refused(silent, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
        assert_refused(pull, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
        assert job.client.pull()[0].global_step == STEP + 1
