"""The server refuses any wrong input with one line, changes nothing, and continues to serve."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode

from ma_client import ParameterServerSession
from modelaverage import wire
from modelaverage.errors import ConflictError, InvalidRequestError, Reason, ServerUnavailableError
from modelaverage.manifest import MAX_VARIABLES
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from tests.conftest import StartServer
from tests.raw_client import (
    Arrays,
    RawClient,
    Stream,
    flat_bytes,
    fragment,
    fragments_of,
    initialize_header,
    manifest_of,
    push_header,
    until,
)

STEP = 7
CENTER = {
    "w": np.arange(35, dtype=np.float32).reshape(5, 7),
    "b": np.array([0.5, -0.5, 2.0]),
    "scale": np.array(3.0, np.float32),
}
A: Arrays = {name: value + value.dtype.type(1) for name, value in CENTER.items()}
B: Arrays = {name: value - value.dtype.type(4) for name, value in CENTER.items()}
AVERAGE: Arrays = {name: (A[name] + B[name]) / CENTER[name].dtype.type(2) for name in CENTER}
FRAGMENTS = fragments_of(A)
NOT_PROTOBUF = b"\xff\xff\xff\xff"
LONG = 1 << 40


class Job:
    """A server of two workers, with a center at STEP unless the test is about having none."""

    def __init__(self, client: RawClient, address: str) -> None:
        self.client = client
        self.address = address
        self.manifest_id = ""

    def initialize(self) -> None:
        self.manifest_id = self.client.initialize(CENTER, STEP).manifest_id

    def header(self, worker_id: str = "a", **fields: Any) -> pb.PushAndAverageRequest:
        return push_header(self.manifest_id, worker_id, **{"base_step": STEP, **fields})

    def open_push(self, *messages: pb.PushAndAverageRequest | bytes) -> Stream[pb.PushAndAverageResponse]:
        stream = self.client.open_push()
        stream.send(*messages)
        return stream

    def admitted(self, worker_id: str = "a", **fields: Any) -> Stream[pb.PushAndAverageResponse]:
        """A push whose header was accepted, with nothing given yet."""
        stream = self.open_push(self.header(worker_id, **fields))
        assert stream.admission() == 0
        return stream

    def assert_still_serves(self) -> None:
        """The center is what it was, and a right round commits with the right average."""
        if not self.manifest_id:
            assert self.client.status().phase == pb.PHASE_UNINITIALIZED
            self.initialize()
        self._assert_center(CENTER, STEP)
        pushes = {"a": self.client.open_push(), "b": self.client.open_push()}
        pushes["a"].push(self.header("a"), A)
        pushes["b"].push(self.header("b"), B)
        for push in pushes.values():
            outcome, center = push.answer()
            assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
            assert list(outcome.contributors) == ["a", "b"]
            assert center == flat_bytes(AVERAGE)
        self._assert_center(AVERAGE, STEP + 1)

    def _assert_center(self, arrays: Arrays, global_step: int) -> None:
        header, flat = self.client.pull()
        assert header.global_step == global_step
        assert header.manifest == manifest_of(CENTER)
        assert flat == flat_bytes(arrays)


@contextmanager
def running(start_server: StartServer, **settings: Any) -> Iterator[Job]:
    address = start_server(2, **settings).address
    with RawClient(address) as client:
        yield Job(client, address)


@pytest.fixture
def bare(start_server: StartServer) -> Iterator[Job]:
    """No center yet."""
    with running(start_server) as job:
        yield job


@pytest.fixture
def job(bare: Job) -> Job:
    bare.initialize()
    return bare


@pytest.fixture
def impatient(start_server: StartServer) -> Iterator[Job]:
    """No center yet, and streams that stall are lost after 1 s."""
    with running(start_server, stall_timeout_s=1.0) as job:
        yield job


def assert_refused(stream: Stream[Any], code: StatusCode, reason: str, *named: object) -> None:
    """The call fails with this code and reason, and its one line names every one of these."""
    refusal = stream.refusal()
    assert (refusal.code, refusal.reason) == (code, reason), refusal
    assert_one_line(refusal.message, *named)


def assert_one_line(message: str, *named: object) -> None:
    assert message == message.strip()
    assert message.isprintable(), repr(message)
    for name in named:
        assert str(name) in message


def assert_fails_in_one_line(process: subprocess.CompletedProcess[str], *named: object) -> None:
    assert process.returncode not in (0, None)
    assert process.stdout == ""
    assert process.stderr.endswith("\n")
    assert_one_line(process.stderr[:-1], *named)


# A push whose header is wrong.


def test_a_push_before_initialization_is_refused(bare: Job) -> None:
    stream = bare.open_push(push_header("any", "a"))
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "NOT_INITIALIZED", "chief")
    bare.assert_still_serves()


def test_a_push_by_an_unknown_manifest_is_refused(job: Job) -> None:
    stream = job.open_push(push_header("0123abcd", "a", base_step=STEP))
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "MANIFEST_UNKNOWN", "'a'", "0123abcd", job.manifest_id)
    job.assert_still_serves()


def test_a_push_by_no_manifest_is_refused(job: Job) -> None:
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
        for weight in (0.0, -1.0, float("nan"), float("inf")):
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
    # The first goes on as if nothing had been.
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


# A push whose fragments are wrong. What came before the fault is kept: the same push is asked for the rest only.


def test_a_push_with_a_missing_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=1)
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISSING", "1 of 3")
    job.assert_still_serves()


def test_a_push_without_any_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISSING", "0 of 3")
    job.assert_still_serves()


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("index", [3, 2**32 - 1])
def test_a_push_with_an_extra_fragment_is_refused(job: Job, given: int, index: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=given)
    stream.send(fragment(index, bytes(64)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_EXTRA", f"fragment {index}", 3)
    job.assert_still_serves()


def test_a_push_with_a_misplaced_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=1)
    stream.give(FRAGMENTS, first=2)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_MISPLACED", "fragment 2", 1)
    job.assert_still_serves()


@pytest.mark.parametrize("given", [1, 3])
def test_a_push_with_a_repeated_fragment_is_refused(job: Job, given: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=given)
    stream.give(FRAGMENTS, end=1)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_REPEATED", "fragment 0", given)
    job.assert_still_serves()


@pytest.mark.parametrize(("index", "right"), [(0, 64), (2, 44)])
@pytest.mark.parametrize("surplus", [-1, -8, 1, 8])
def test_a_push_with_a_wrongly_sized_fragment_is_refused(job: Job, index: int, right: int, surplus: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=index)
    stream.send(fragment(index, bytes(right + surplus)))
    assert_refused(
        stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", f"fragment {index}", right + surplus, right
    )
    job.assert_still_serves()


@pytest.mark.parametrize(("first", "size_bytes"), [(0, 64 + 8), (0, 2 * 64 + 1), (1, 64 + 44 + 8), (2, 44 + 64)])
def test_a_run_that_is_not_of_whole_fragments_changes_nothing(job: Job, first: int, size_bytes: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=first)
    stream.send(fragment(first, bytes(size_bytes)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", f"fragment {first}", size_bytes)
    job.assert_still_serves()


def test_a_run_counts_as_its_fragments_do(job: Job) -> None:
    stream = job.admitted()
    stream.send(fragment(0, b"".join(FRAGMENTS[:2])))
    stream.give(FRAGMENTS, first=0, end=1)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_REPEATED", "fragment 0", 2)
    job.assert_still_serves()


def test_a_push_from_the_last_step_that_there_is_is_refused(job: Job) -> None:
    stream = job.open_push(job.header(base_step=2**63 - 1))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "GLOBAL_STEP_INVALID", 2**63 - 1)
    job.assert_still_serves()


def test_a_push_with_an_empty_fragment_is_refused(job: Job) -> None:
    stream = job.admitted()
    stream.send(fragment(0, b""))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", "fragment 0", "0 bytes", 64)
    job.assert_still_serves()


def test_a_push_of_other_variables_is_refused(job: Job) -> None:
    wrong: list[tuple[Arrays, tuple[str, ...]]] = [
        ({"w": np.zeros((5, 7))}, ("'w'", "float64[5, 7]", "float32[5, 7]")),
        ({"w": np.zeros((7, 5), np.float32)}, ("'w'", "float32[7, 5]", "float32[5, 7]")),
        ({"scale": np.zeros(1, np.float32)}, ("'scale'", "float32[1]", "float32[]")),
        ({"b": np.zeros(3, np.int64)}, ("'b'", "int64")),
        ({"more": np.zeros(1)}, ("'more'",)),
    ]
    with ParameterServerSession([job.address], worker_id="a") as session:
        session.pull()
        for changed, named in wrong:
            with pytest.raises((ConflictError, InvalidRequestError)) as refused:
                session.push_and_average({**A, **changed})
            assert_one_line(str(refused.value), *named)
    job.assert_still_serves()


def test_a_push_without_one_of_the_variables_is_refused(job: Job) -> None:
    with ParameterServerSession([job.address], worker_id="a") as session:
        session.pull()
        with pytest.raises(ConflictError) as refused:
            session.push_and_average({"w": A["w"], "scale": A["scale"]})
    assert refused.value.reason is Reason.MANIFEST_MISMATCH
    assert_one_line(str(refused.value), "'b'")
    job.assert_still_serves()


# Initial values that are wrong.


def assert_manifest_refused(job: Job, manifest: pb.Manifest, *named: object) -> None:
    stream = job.client.open_initialize()
    stream.send(initialize_header(manifest))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MANIFEST_INVALID", *named)
    job.assert_still_serves()


def one_variable(name: str = "w", data_type: int = 1, shape: tuple[int, ...] = (2,)) -> pb.Manifest:
    variable = pb.Variable(name=name, shape=shape)
    variable.data_type = data_type  # type: ignore[assignment]  # numbers that the enumeration lacks, too
    return pb.Manifest(variables=[variable], fragment_size_bytes=64)


def test_a_manifest_with_no_variables_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, pb.Manifest(fragment_size_bytes=64), "no variables")


def test_no_manifest_is_refused(bare: Job) -> None:
    stream = bare.client.open_initialize()
    stream.send(pb.InitializeRequest(header=pb.InitializeHeader(worker_id="chief")))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MANIFEST_INVALID", "no variables")
    bare.assert_still_serves()


def test_a_manifest_with_a_repeated_name_is_refused(bare: Job) -> None:
    manifest = manifest_of(CENTER)
    manifest.variables[2].name = "w"
    assert_manifest_refused(bare, manifest, "'w'", "twice")


def test_a_manifest_of_too_many_variables_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=64, variables=[pb.Variable()] * (MAX_VARIABLES + 1))
    assert_manifest_refused(bare, manifest, f"{MAX_VARIABLES + 1} variables", MAX_VARIABLES)


def test_a_manifest_that_no_pull_could_be_answered_with_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=64)
    for number in range(4080):
        manifest.variables.add(name=f"{number:04d}".ljust(1017, "n"), data_type=pb.DATA_TYPE_FLOAT32, shape=[1])
    size_bytes = manifest.ByteSize()
    assert wire.MAX_MANIFEST_BYTES < size_bytes < (4 << 20) - 20  # the header of Initialize fits a message
    assert_manifest_refused(bare, manifest, "4080 variables", f"{size_bytes} bytes", wire.MAX_MANIFEST_BYTES)


def test_a_session_refuses_what_no_message_can_carry_before_it_sends_anything(bare: Job) -> None:
    arrays = {f"{number:04d}".ljust(1017, "n"): np.zeros(1, np.float32) for number in range(4080)}
    with ParameterServerSession([bare.address], worker_id="chief", is_chief=True) as session:
        with pytest.raises(InvalidRequestError) as refused:
            session.initialize(arrays)
        assert refused.value.reason is Reason.MANIFEST_INVALID
        assert refused.value.status is None  # nobody was asked
        assert_one_line(str(refused.value), "4080 variables", wire.MAX_MANIFEST_BYTES)
    bare.assert_still_serves()


@pytest.mark.parametrize(("name", "size"), [("", 0), ("n" * 1025, 1025)])
def test_a_manifest_with_an_empty_or_over_long_name_is_refused(bare: Job, name: str, size: int) -> None:
    assert_manifest_refused(bare, one_variable(name=name), f"{size} bytes", "1 to 1024")


@pytest.mark.parametrize("shape", [(-1,), (3, -2, 0), (-1, -1)])
def test_a_manifest_with_a_negative_shape_is_refused(bare: Job, shape: tuple[int, ...]) -> None:
    assert_manifest_refused(bare, one_variable(shape=shape), "'w'", "negative", min(shape), shape)


@pytest.mark.parametrize("shape", [(2**61,), (2**62, 4), (2**32, 2**32), (2**63 - 1,) * 4])
def test_a_manifest_with_an_overflowing_shape_is_refused(bare: Job, shape: tuple[int, ...]) -> None:
    assert_manifest_refused(bare, one_variable(shape=shape), "'w'", shape)


def test_a_manifest_with_an_overflowing_shape_that_a_zero_makes_empty_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, one_variable(shape=(0, 2**62, 2**62)), "'w'")


def test_a_manifest_with_too_many_dimensions_is_refused(bare: Job) -> None:
    assert_manifest_refused(bare, one_variable(shape=(1,) * 65), "'w'")


def test_a_manifest_whose_sizes_overflow_together_is_refused(bare: Job) -> None:
    manifest = pb.Manifest(fragment_size_bytes=2 << 20)
    for index in range(3):
        manifest.variables.add(name=f"w{index}", data_type=pb.DATA_TYPE_FLOAT32, shape=[2**60])
    assert_manifest_refused(bare, manifest, 3 * 2**62)


@pytest.mark.parametrize("data_type", [0, 5, 99])
def test_a_manifest_with_an_unknown_dtype_is_refused(bare: Job, data_type: int) -> None:
    assert_manifest_refused(bare, one_variable(data_type=data_type), "'w'", data_type, "float32")


@pytest.mark.parametrize("size_bytes", [0, 4, 12, 63, (2 << 20) + 8, 2**32 - 8])
def test_a_bad_fragment_size_is_refused(bare: Job, size_bytes: int) -> None:
    assert_manifest_refused(bare, manifest_of(CENTER, size_bytes), f"fragment_size_bytes {size_bytes}", 8, 2 << 20)


def test_a_model_cut_into_far_too_many_fragments_is_refused(start_server: StartServer) -> None:
    # Every fragment costs the server some memory, before any of them has come.
    with running(start_server, max_model_bytes=LONG) as job:
        manifest = one_variable(shape=(LONG // 8,))
        manifest.fragment_size_bytes = 8
        assert_manifest_refused(job, manifest, LONG // 2)


def test_a_model_over_max_model_bytes_is_refused(start_server: StartServer) -> None:
    with running(start_server, max_model_bytes=1000) as job:
        assert_manifest_refused(job, one_variable(shape=(251,)), 1004, "--max-model-bytes", 1000)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-workers", "10001"], "--num-workers 10001"),
        (["--num-workers", "3", "--min-workers", "2", "--max-workers", "10001"], "--max-workers 10001"),
    ],
)
def test_more_workers_than_an_outcome_can_name_are_refused(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--bind", "127.0.0.1:0", *flags]) == 1
    assert_one_line(capsys.readouterr().err[:-1], named, "at most 10000")


def test_an_initial_step_that_does_not_fit_63_bits_is_refused(bare: Job) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER), global_step=2**63))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "GLOBAL_STEP_INVALID", 2**63)
    bare.assert_still_serves()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"v": CENTER["w"], "b": CENTER["b"], "scale": CENTER["scale"]}, ("variable 0", "'v'", "'w'")),
        ({**CENTER, "w": np.zeros((5, 7))}, ("'w'", "float64[5, 7]", "float32[5, 7]")),
        ({**CENTER, "b": np.zeros((3, 1))}, ("'b'", "float64[3, 1]", "float64[3]")),
        ({**CENTER, "more": CENTER["b"]}, ("'more'",)),
        ({"w": CENTER["w"], "b": CENTER["b"]}, ("'scale'",)),
        ({"b": CENTER["b"], "w": CENTER["w"], "scale": CENTER["scale"]}, ("variable 0", "'b'", "'w'")),
    ],
    ids=["name", "dtype", "shape", "one more", "one less", "order"],
)
def test_a_second_different_manifest_is_refused(job: Job, other: Arrays, named: tuple[str, ...]) -> None:
    stream = job.client.open_initialize()
    stream.send(initialize_header(manifest_of(other)))
    stream.give(fragments_of(other))
    stream.half_close()
    assert_refused(stream, StatusCode.FAILED_PRECONDITION, "MANIFEST_MISMATCH", *named)
    job.assert_still_serves()


@pytest.mark.parametrize(
    ("sent", "reason", "named"),
    [
        ([0], "FRAGMENT_MISSING", ("1 of 3",)),
        ([], "FRAGMENT_MISSING", ("0 of 3",)),
        ([0, 3], "FRAGMENT_EXTRA", ("fragment 3", 3)),
        ([0, 1, 2, 2], "FRAGMENT_EXTRA", (3,)),
        ([0, 2], "FRAGMENT_MISPLACED", ("fragment 2", 1)),
        ([0, 0], "FRAGMENT_REPEATED", ("fragment 0", 1)),
    ],
)
def test_initial_values_with_wrong_fragments_are_refused(
    bare: Job, sent: list[int], reason: str, named: tuple[object, ...]
) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER)))
    for index in sent:
        stream.send(fragment(index, (FRAGMENTS + [bytes(64)])[index]))
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, reason, *named)
    bare.assert_still_serves()


@pytest.mark.parametrize("surplus", [-8, 8])
def test_initial_values_with_a_wrongly_sized_fragment_are_refused(bare: Job, surplus: int) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER)), fragment(0, bytes(64 + surplus)))
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", "fragment 0", 64 + surplus, 64)
    bare.assert_still_serves()


# Messages that are none, or that come out of order.


@pytest.mark.parametrize("rpc", ["Initialize", "Pull", "PushAndAverage", "GetStatus"])
def test_bytes_that_are_no_protobuf_are_refused_by_every_call(job: Job, rpc: str) -> None:
    opened: dict[str, Callable[[], Stream[Any]]] = {
        "Initialize": job.client.open_initialize,
        "Pull": job.client.open_pull,
        "PushAndAverage": job.client.open_push,
        "GetStatus": job.client.open_status,
    }
    stream = opened[rpc]()
    stream.send(NOT_PROTOBUF)
    stream.half_close()
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED", f"{len(NOT_PROTOBUF)} bytes")
    job.assert_still_serves()


@pytest.mark.parametrize("garbage", [NOT_PROTOBUF, b"\x12\x46\x12", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_bytes_that_are_no_protobuf_are_refused_in_the_middle_of_a_push(job: Job, garbage: bytes) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=1)
    stream.send(garbage)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED", f"{len(garbage)} bytes")
    job.assert_still_serves()


def test_bytes_that_are_no_protobuf_are_refused_in_the_middle_of_the_initial_values(bare: Job) -> None:
    stream = bare.client.open_initialize()
    stream.send(initialize_header(manifest_of(CENTER)), fragment(0, FRAGMENTS[0]), NOT_PROTOBUF)
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED", f"{len(NOT_PROTOBUF)} bytes")
    bare.assert_still_serves()


@pytest.mark.parametrize("message", [b"", fragment(0, FRAGMENTS[0])], ids=["empty", "fragment"])
def test_a_message_where_the_header_belongs_is_refused(bare: Job, message: pb.PushAndAverageRequest | bytes) -> None:
    streams: list[Stream[Any]] = [bare.client.open_initialize(), bare.client.open_push()]
    for stream in streams:
        stream.send(message)
        assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_OUT_OF_ORDER", "header")
    bare.assert_still_serves()


def test_a_stream_without_a_message_is_refused(bare: Job) -> None:
    streams: list[Stream[Any]] = [bare.client.open_initialize(), bare.client.open_push()]
    for stream in streams:
        stream.half_close()
        assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_OUT_OF_ORDER", "header")
    bare.assert_still_serves()


@pytest.mark.parametrize("repeated", [False, True], ids=["empty", "header twice"])
@pytest.mark.parametrize("given", [0, 1])
def test_a_message_where_a_fragment_of_a_push_belongs_is_refused(job: Job, repeated: bool, given: int) -> None:
    stream = job.admitted()
    stream.give(FRAGMENTS, end=given)
    stream.send(job.header() if repeated else b"")
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_OUT_OF_ORDER", "fragment")
    job.assert_still_serves()


@pytest.mark.parametrize("repeated", [False, True], ids=["empty", "header twice"])
@pytest.mark.parametrize("given", [0, 1])
def test_a_message_where_an_initial_fragment_belongs_is_refused(bare: Job, repeated: bool, given: int) -> None:
    header = initialize_header(manifest_of(CENTER))
    stream = bare.client.open_initialize()
    stream.send(header)
    stream.give(FRAGMENTS, end=given)
    stream.send(header if repeated else b"")
    assert_refused(stream, StatusCode.INVALID_ARGUMENT, "MESSAGE_OUT_OF_ORDER", "fragment")
    bare.assert_still_serves()


def test_a_message_over_grpcs_limit_ends_its_call_only(job: Job) -> None:
    stream = job.admitted()
    stream.send(fragment(0, bytes(5 << 20)))
    assert stream.refusal().code in (StatusCode.RESOURCE_EXHAUSTED, StatusCode.INVALID_ARGUMENT)
    job.assert_still_serves()


# Streams that end or stall in the middle. (Half-closed ones: see the missing fragments.)


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
    # Another call that does stall, and began later, shows that the time has passed.
    assert_refused(impatient.open_push(), StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED")
    second = impatient.client.open_push()
    second.push(impatient.header("b"), B)
    assert first.answer()[1] == second.answer()[1] == flat_bytes(AVERAGE)


def test_a_client_that_does_not_read_holds_up_nobody_but_itself(start_server: StartServer) -> None:
    # Large enough that it does not fit what gRPC holds for a reader that is late.
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
        # One more call that stalls, and began later, shows that the time has passed.
        assert_refused(job.open_push(), StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED")
        assert_refused(silent, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
        assert_refused(pull, StatusCode.DEADLINE_EXCEEDED, "STREAM_STALLED", "1 s")
        assert job.client.pull()[0].global_step == STEP + 1


# Servers that are not there.


@contextmanager
def deaf() -> Iterator[str]:
    """The address of something that listens, and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def ps_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ps_server", *arguments], capture_output=True, text=True, timeout=20, check=False
    )


def test_a_port_that_is_taken_is_named() -> None:
    with deaf() as address:
        process = ps_server("serve", "--num-workers", "2", "--bind", address)
    assert_fails_in_one_line(process, address)


def test_a_port_that_another_parameter_server_has_is_named(job: Job) -> None:
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", "--bind", job.address), job.address)
    job.assert_still_serves()


@pytest.mark.parametrize(
    "bind",
    ["127.0.0.1", ":2222", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000", "127.0.0.1:-1", "[::1:0"]
    + ["127.0.0.1:\u00b2", "a..b:2222", "192.0.2.1:0"],
)
def test_an_address_where_nobody_can_listen_is_named(bind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--num-workers", "2", "--bind", bind]) != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_one_line(printed.err[:-1], bind)


def test_a_malformed_address_ends_the_process_with_one_line() -> None:
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", "--bind", "nonsense"), "nonsense", "HOST:PORT")


def test_a_ready_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "ready.json"
    bind = ("--bind", "127.0.0.1:0")
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", *bind, "--ready-file", str(missing)), missing)


@contextmanager
def nobody() -> Iterator[str]:
    """An address where nobody listens."""
    with deaf() as address:
        pass
    yield address


@pytest.mark.parametrize("absent", [nobody, deaf])
def test_a_session_names_the_server_that_is_not_there(absent: Callable[[], AbstractContextManager[str]]) -> None:
    with absent() as address:
        begin_s = time.monotonic()
        with pytest.raises(ServerUnavailableError) as refused:
            ParameterServerSession([address], worker_id="a", connect_timeout_s=0.3)
        assert time.monotonic() - begin_s < 5
    assert_one_line(str(refused.value), address, "0.3 s")


@pytest.mark.parametrize("absent", [nobody, deaf])
def test_status_names_the_server_that_is_not_there(
    absent: Callable[[], AbstractContextManager[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with absent() as address:
        begin_s = time.monotonic()
        assert main(["status", address, "--timeout-s", "0.3"]) != 0
        assert time.monotonic() - begin_s < 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_one_line(printed.err[:-1], address, "0.3 s")


def test_the_status_process_fails_in_one_line() -> None:
    with nobody() as address:
        assert_fails_in_one_line(ps_server("status", address, "--timeout-s", "0.3"), address)


@pytest.mark.parametrize("address", ["", "127.0.0.1:99999"])
def test_status_of_an_address_that_is_none_fails_in_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", address, "--timeout-s", "0.3"]) != 0
    assert_one_line(capsys.readouterr().err[:-1], address)


@pytest.mark.parametrize("ps_hosts", [[], ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"], "127.0.0.1:1"])
def test_a_session_without_addresses_or_with_one_twice_is_refused(ps_hosts: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ParameterServerSession(ps_hosts, worker_id="a")
    assert_one_line(str(refused.value), "ps_hosts", "127.0.0.1:1" if ps_hosts else "[]")


@pytest.mark.parametrize(("worker_id", "size"), [("", 0), ("w" * 129, 129)])
def test_a_session_refuses_a_bad_worker_id(worker_id: str, size: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ParameterServerSession(["127.0.0.1:1"], worker_id=worker_id)
    assert refused.value.reason is Reason.WORKER_ID_INVALID
    assert_one_line(str(refused.value), f"{size} bytes", "1 to 128")
