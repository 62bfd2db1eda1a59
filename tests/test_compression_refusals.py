"""What a server of a job with a codec refuses, and that a refused call changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode

from modelaverage.conformance.models import coded_fragments_of
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.raw_client import RawClient, Refusal, Stream, flat_bytes, fragments_of, manifest_of, push_header

MODEL = {"w": np.linspace(-1, 1, 1100, dtype=np.float32), "b": np.arange(7, dtype=np.float32)}
LOCAL = {name: value + np.float32(0.5) for name, value in MODEL.items()}
SIZE_BYTES = 1024
STEP = 3


class CodedJob:
    """A server of one worker with a center at STEP, and a raw client of it."""

    def __init__(self, client: RawClient, compression: str) -> None:
        self.client = client
        response = self.initialize(compression)
        assert isinstance(response, pb.InitializeResponse)
        header, _ = client.pull()
        self.manifest_id, self.center_id = header.manifest_id, header.center_id

    def initialize(self, compression: str) -> pb.InitializeResponse | Refusal:
        stream = self.client.open_initialize()
        header = pb.InitializeHeader(worker_id="chief", global_step=STEP, compression=compression)
        header.manifest.CopyFrom(manifest_of(MODEL, SIZE_BYTES))
        stream.send(pb.InitializeRequest(header=header))
        stream.give(fragments_of(MODEL, SIZE_BYTES))
        stream.half_close()
        try:
            return stream.receive()
        except Exception:
            return stream.refusal()

    def pull(self, compression: str) -> Refusal:
        stream = self.client.open_pull()
        stream.send(pb.PullRequest(worker_id="a", compression=compression))
        stream.half_close()
        return stream.refusal()

    def open_push(self, **fields: Any) -> Stream[pb.PushAndAverageResponse]:
        stream = self.client.open_push()
        coded = {"codec": "int8", "base_center_id": self.center_id, "base_step": STEP}
        stream.send(push_header(self.manifest_id, "a", **{**coded, **fields}))
        return stream

    def check_unchanged(self) -> None:
        """The center is the initial one, and the round goes on: a good push in the codec commits."""
        header, flat = self.client.pull()
        assert (header.global_step, header.center_id, flat) == (STEP, self.center_id, flat_bytes(MODEL))
        if header.compression == "int8":
            stream = self.open_push(push_id=9)
            assert stream.receive().admission == pb.PushAdmission(codec="int8")
            stream.give(coded_fragments_of(LOCAL, MODEL, SIZE_BYTES, "int8"))
            stream.half_close()
            assert stream.answer()[0].outcome == pb.OUTCOME_COMMITTED


@contextmanager
def running(start_server: StartServer, compression: str) -> Iterator[CodedJob]:
    with RawClient(start_server(1).address) as client:
        yield CodedJob(client, compression)


@pytest.fixture
def job(start_server: StartServer) -> Iterator[CodedJob]:
    with running(start_server, "int8") as job:
        yield job


def check(refusal: object, code: StatusCode, reason: str, *texts: str) -> None:
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.reason) == (code, reason)
    assert "\n" not in refusal.message
    for text in texts:
        assert text in refusal.message


@pytest.mark.parametrize(("other", "said"), [("raw", "none"), ("int4", "int4"), ("bfloat16", "bfloat16")])
def test_a_call_that_names_another_compression_is_refused_with_both_named(other: str, said: str, job: CodedJob) -> None:
    for refusal in (job.initialize(other), job.pull(other)):
        check(refusal, StatusCode.FAILED_PRECONDITION, "COMPRESSION_MISMATCH", "compression int8", f"names {said}")
    job.check_unchanged()


def test_a_raw_job_is_another_one_than_a_job_with_a_codec(start_server: StartServer) -> None:
    with running(start_server, "") as job:
        for refusal in (job.initialize("int8"), job.pull("int8")):
            check(refusal, StatusCode.FAILED_PRECONDITION, "COMPRESSION_MISMATCH", "compression none", "names int8")
        job.check_unchanged()


@pytest.mark.parametrize("unknown", ["zip", "INT8", "none", "\u00fc\n", "x" * 300])
def test_a_compression_that_the_server_does_not_know_is_refused_by_name(unknown: str, job: CodedJob) -> None:
    for refusal in (job.initialize(unknown), job.pull(unknown)):
        check(refusal, StatusCode.INVALID_ARGUMENT, "CODEC_UNKNOWN", repr(unknown[:40]), "'int8'")
        assert isinstance(refusal, Refusal)
        assert len(refusal.message) < 200
    job.check_unchanged()


def test_an_unknown_compression_is_refused_before_there_is_a_center(start_server: StartServer) -> None:
    with RawClient(start_server(1).address) as client:
        stream = client.open_initialize()
        header = pb.InitializeHeader(worker_id="chief", compression="zip", manifest=manifest_of(MODEL, SIZE_BYTES))
        stream.send(pb.InitializeRequest(header=header))
        check(stream.refusal(), StatusCode.INVALID_ARGUMENT, "CODEC_UNKNOWN")
        assert client.status().phase == pb.PHASE_UNINITIALIZED


@pytest.mark.parametrize("codec", ["int4", "bfloat16", "zip"])
def test_a_push_in_another_codec_than_the_jobs_is_refused(codec: str, job: CodedJob) -> None:
    check(job.open_push(codec=codec).refusal(), StatusCode.INVALID_ARGUMENT, "CODEC_UNKNOWN", codec, "int8")
    job.check_unchanged()


def test_a_push_in_a_codec_is_refused_in_a_raw_job(start_server: StartServer) -> None:
    with running(start_server, "") as job:
        check(job.open_push().refusal(), StatusCode.INVALID_ARGUMENT, "CODEC_UNKNOWN", "int8", "the job has raw")
        job.check_unchanged()


@pytest.mark.parametrize("wrong", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("base_step", [STEP, STEP + 1])
def test_a_push_relative_to_a_center_that_the_server_does_not_have_is_refused(
    wrong: int, base_step: int, job: CodedJob
) -> None:
    stream = job.open_push(base_center_id=wrong, base_step=base_step)
    check(stream.refusal(), StatusCode.FAILED_PRECONDITION, "BASE_UNKNOWN", "int8", "push again raw")
    job.check_unchanged()


def test_the_same_push_made_again_raw_is_taken(job: CodedJob) -> None:
    assert job.open_push(base_center_id=1).refusal().reason == "BASE_UNKNOWN"
    stream = job.open_push(codec="", base_center_id=0)
    assert stream.receive().admission == pb.PushAdmission()
    stream.give(fragments_of(LOCAL, SIZE_BYTES))
    stream.half_close()
    outcome, _ = stream.answer()
    assert outcome.outcome == pb.OUTCOME_COMMITTED
    assert outcome.center_id not in (0, 1, job.center_id)


@pytest.mark.parametrize("raw", ["raw", ""])
def test_a_raw_push_needs_no_base(raw: str, job: CodedJob) -> None:
    stream = job.open_push(codec=raw, base_center_id=1)
    stream.receive()
    stream.give(fragments_of(LOCAL, SIZE_BYTES))
    stream.half_close()
    assert stream.answer()[0].outcome == pb.OUTCOME_COMMITTED


def test_a_stale_push_in_a_codec_gets_the_raw_center_whatever_its_base(job: CodedJob) -> None:
    stream = job.open_push(base_step=STEP - 1, base_center_id=1)
    count = len(fragments_of(MODEL, SIZE_BYTES))
    assert stream.receive().admission == pb.PushAdmission(first_needed_fragment=count)
    stream.half_close()
    outcome, flat = stream.answer()
    assert (outcome.outcome, outcome.center_id, flat) == (pb.OUTCOME_STALE, job.center_id, flat_bytes(MODEL))


@pytest.mark.parametrize("wrong", ["raw", "short", "long", "empty", "a run and a byte"])
def test_a_coded_fragment_of_a_wrong_size_is_refused(wrong: str, job: CodedJob) -> None:
    coded = coded_fragments_of(LOCAL, MODEL, SIZE_BYTES, "int8")
    data = {
        "raw": fragments_of(LOCAL, SIZE_BYTES)[1],
        "short": coded[1][:-1],
        "long": coded[1] + b"\0",
        "empty": b"",
        "a run and a byte": coded[1] + coded[2] + b"\0",
    }[wrong]
    stream = job.open_push()
    stream.receive()
    stream.give([coded[0], data])
    check(
        stream.refusal(),
        StatusCode.INVALID_ARGUMENT,
        "FRAGMENT_SIZE_WRONG",
        f"fragment 1 has {len(data)} bytes; codec int8 gives it {len(coded[1])}",
    )
    header, flat = job.client.pull()
    assert (header.global_step, flat) == (STEP, flat_bytes(MODEL))


def test_a_coded_fragment_in_a_raw_push_is_refused(job: CodedJob) -> None:
    stream = job.open_push(codec="")
    stream.receive()
    stream.give(coded_fragments_of(LOCAL, MODEL, SIZE_BYTES, "int8"))
    check(stream.refusal(), StatusCode.INVALID_ARGUMENT, "FRAGMENT_SIZE_WRONG", "the manifest gives it 1024")
