"""Pushes that abstain, and pushes that restore a center, with a real server."""

from __future__ import annotations

import numpy as np
import pytest
from grpc import StatusCode

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of, running
from tests.raw_client import Arrays, flat_bytes, fragment, fragments_of

ABSTAIN, RESTORE = pb.PURPOSE_ABSTAIN, pb.PURPOSE_RESTORE
# No average of other values has these bits: a float32 sum would lose the small values.
LOST: Arrays = {**of(7), "w": np.full(40, 1e-9, np.float32), "scale": np.array(np.nextafter(0.5, 1.0))}


def test_a_push_that_abstains_is_answered_with_the_average_of_the_others(start_server: StartServer) -> None:
    with running(start_server, 3) as job:
        abstaining, first_needed = job.admitted("a", purpose=ABSTAIN)
        assert first_needed == COUNT
        abstaining.half_close()
        others = [job.push("b", of(1)), job.push("c", of(3), purpose=pb.PURPOSE_CONTRIBUTE)]
        for stream in (abstaining, *others):
            outcome, center = stream.answer()
            assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
            assert list(outcome.contributors) == ["b", "c"]
            assert center == flat_bytes(of(2))


def test_if_all_abstain_the_center_stays_as_it_is(job: Job) -> None:
    streams = [job.admitted(worker_id, purpose=ABSTAIN)[0] for worker_id in "ab"]
    for stream in streams:
        stream.half_close()
        outcome, center = stream.answer()
        assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
        assert list(outcome.contributors) == []
        assert center == flat_bytes(CENTER)
    assert job.center() == flat_bytes(CENTER)


def test_a_push_that_abstains_and_gives_a_fragment_is_refused(job: Job) -> None:
    stream, _ = job.admitted("a", purpose=ABSTAIN)
    stream.send(fragment(0, fragments_of(of(1))[0]))
    assert stream.refusal().reason == "FRAGMENT_REPEATED"


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
@pytest.mark.parametrize("step", [STEP, STEP + 5], ids=["the server's step", "a later step"])
def test_a_center_that_is_given_back_is_the_next_one_bit_for_bit(
    start_server: StartServer, order: str, step: int
) -> None:
    with running(start_server, 3) as job:
        streams = {worker_id: job.admitted(worker_id, base_step=step, weight=1e9)[0] for worker_id in "a"}
        streams |= {worker_id: job.admitted(worker_id, base_step=step, purpose=RESTORE)[0] for worker_id in "bc"}
        values = {"a": of(5), "b": LOST, "c": of(9)}
        for worker_id in order:
            streams[worker_id].give(fragments_of(values[worker_id]))
            streams[worker_id].half_close()
            if worker_id != order[-1]:
                job.given(worker_id, COUNT)
        for stream in streams.values():
            outcome, center = stream.answer()
            assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, step + 1)
            assert list(outcome.contributors) == ["a", "b", "c"]
            assert center == flat_bytes(LOST)
        assert job.center() == flat_bytes(LOST)


def test_a_purpose_that_the_server_does_not_know_is_refused(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a", purpose=9))
    refusal = stream.refusal()
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED")
    assert "purpose 9" in refusal.message
