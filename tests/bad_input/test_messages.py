"""Messages that are malformed, out of order or too large are refused with one line and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grpc import StatusCode

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.bad_input.guarded import CENTER, FRAGMENTS, Job, assert_refused
from tests.raw_client import Stream, fragment, initialize_header, manifest_of

NOT_PROTOBUF = b"\xff\xff\xff\xff"


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
