"""A push whose header is wrong is refused with one line and changes nothing."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from ma_client import ParameterServerSession
from modelaverage.errors import InvalidRequestError, Reason
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.bad_input.guarded import AVERAGE, CENTER, FRAGMENTS, STEP, A, B, Job, assert_one_line, assert_refused
from tests.raw_client import flat_bytes, fragments_of, initialize_header, manifest_of, push_header


def test_a_push_before_initialization_is_refused(bare: Job) -> None:
    stream = bare.open_push(push_header("any", "a"))
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "NOT_INITIALIZED", "chief")
    bare.assert_still_serves()


def test_a_push_by_an_unknown_manifest_is_refused(job: Job) -> None:
    stream = job.open_push(push_header("0123abcd", "a", base_step=STEP))
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "MANIFEST_UNKNOWN", "'a'", "0123abcd", job.manifest_id)
    job.assert_still_serves()


def test_a_push_without_a_manifest_id_is_refused(job: Job) -> None:
    stream = job.open_push(push_header("", "a", base_step=STEP))
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "MANIFEST_UNKNOWN", "'a'", job.manifest_id)
    job.assert_still_serves()


def test_a_push_with_an_empty_worker_id_is_refused(job: Job) -> None:
    stream = job.open_push(job.header(""))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "WORKER_ID_INVALID", "0 bytes", "1 to 128")
    job.assert_still_serves()


@pytest.mark.parametrize("worker_id", ["w" * 129, "\u5de5" * 43])
def test_a_push_with_an_over_long_worker_id_is_refused(job: Job, worker_id: str) -> None:
    stream = job.open_push(job.header(worker_id))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "WORKER_ID_INVALID", worker_id[:20], "129 bytes", "1 to 128")
    job.assert_still_serves()


@pytest.mark.parametrize("worker_id", ["", "w" * 129])
def test_a_bad_worker_id_is_refused_by_every_call_that_has_one(bare: Job, worker_id: str) -> None:
    initialize = bare.client.open_initialize()
    initialize.send(initialize_header(manifest_of(CENTER), worker_id))
    assert_refused(initialize, StatusCode.INVALID_ARGUMENT, "WORKER_ID_INVALID", "1 to 128")
    pull = bare.client.open_pull()
    pull.send(pb.PullRequest(worker_id=worker_id, wait_initialized=True))
    pull.half_close()
    assert_refused(pull, StatusCode.INVALID_ARGUMENT, "WORKER_ID_INVALID", "1 to 128")
    bare.assert_still_serves()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 9e-10, 1.1e9])
def test_a_push_with_an_unusable_weight_is_refused(job: Job, weight: float) -> None:
    stream = job.open_push(job.header(weight=weight))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "WEIGHT_INVALID", f"weight {weight:g}", "1e-09", "1e+09")
    job.assert_still_serves()


def test_a_session_refuses_an_unusable_weight(job: Job) -> None:
    with ParameterServerSession([job.address], worker_id="a") as session:
        session.pull()
        for weight in (-1.0, float("nan"), float("inf")):  # 0 is usable: such a push abstains
            with pytest.raises(InvalidRequestError) as refused:
                session.push_and_average(A, weight)
            assert refused.value.reason is Reason.WEIGHT_INVALID
            assert_one_line(str(refused.value), f"weight {weight:g} ")
    job.assert_still_serves()


@pytest.mark.parametrize("ahead", [1, 1000])
def test_a_base_step_above_the_servers_is_refused_unless_all_agree(job: Job, ahead: int) -> None:
    job.admitted("b")
    stream = job.open_push(job.header(base_step=STEP + ahead))
    assert_refused(
        stream, StatusCode.FAILED_PRECONDITION, "BASE_STEP_AHEAD", "'a'", STEP + ahead, f"global_step {STEP}", "pull"
    )
    job.assert_still_serves()


@pytest.mark.parametrize("length", [0, 15, 17])
def test_an_incarnation_of_another_length_is_refused(job: Job, length: int) -> None:
    stream = job.open_push(job.header(incarnation=bytes(length)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "INCARNATION_INVALID", f"{length} bytes", "16")
    job.assert_still_serves()


def test_a_million_untouched_variables_are_refused_like_one_too_many(job: Job) -> None:
    stream = job.open_push(job.header(untouched_variables=[0] * 1_000_000))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "UNTOUCHED_INVALID", "below 3", "(0, 0, 0, 0)")
    job.assert_still_serves()


@pytest.mark.parametrize("untouched", [[3], [0, 2**32 - 1], [1, 0], [0, 0]])
def test_untouched_variables_that_are_no_ascending_indexes_are_refused(job: Job, untouched: list[int]) -> None:
    stream = job.open_push(job.header(untouched_variables=untouched))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "UNTOUCHED_INVALID", "below 3", untouched[-1])
    job.assert_still_serves()


def test_two_live_workers_with_one_id_are_told_apart(job: Job) -> None:
    first = job.admitted("a")
    second = job.open_push(job.header("a", incarnation=b"another process!"))
    assert_refused(second, StatusCode.ALREADY_EXISTS, "WORKER_ID_IN_USE", "'a'")
    # The first continues undisturbed.
    first.give(FRAGMENTS)
    first.half_close()
    b = job.client.open_push()
    b.push(job.header("b"), B)
    for stream in (first, b):
        outcome, center = stream.answer()
        assert (outcome.outcome, center) == (pb.OUTCOME_COMMITTED, flat_bytes(AVERAGE))


def test_one_worker_too_many_is_refused(job: Job) -> None:
    a, b = job.admitted("alice"), job.admitted("bob")
    third = job.open_push(job.header("third"))
    named = ("'third'", f"round {STEP}", "2 workers", "alice", "bob", "--num-workers")
    assert_refused(third, StatusCode.RESOURCE_EXHAUSTED, "ROUND_FULL", *named)
    for stream, arrays in ((a, A), (b, B)):
        stream.give(fragments_of(arrays))
        stream.half_close()
    for stream in (a, b):
        outcome, center = stream.answer()
        assert (outcome.outcome, center) == (pb.OUTCOME_COMMITTED, flat_bytes(AVERAGE))


def test_a_message_is_one_line_whatever_the_workers_are_called(job: Job) -> None:
    job.admitted("two\nlines"), job.admitted("b\r")
    assert_refused(job.open_push(job.header("third")), StatusCode.RESOURCE_EXHAUSTED, "ROUND_FULL", "'third'")


@pytest.mark.parametrize(("worker_id", "size"), [("", 0), ("w" * 129, 129)])
def test_a_session_refuses_a_bad_worker_id(worker_id: str, size: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ParameterServerSession(["127.0.0.1:1"], worker_id=worker_id)
    assert refused.value.reason is Reason.WORKER_ID_INVALID
    assert_one_line(str(refused.value), f"{size} bytes", "1 to 128")
