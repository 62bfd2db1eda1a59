"""A job that hostile input must not change, and the checks of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from grpc import StatusCode

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.raw_client import Arrays, RawClient, Stream, flat_bytes, fragments_of, manifest_of, push_header

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
