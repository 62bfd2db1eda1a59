"""A small job for tests: a center, workers that push to it, and raw clients that break off at a chosen place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc
import ml_dtypes
import numpy as np
from grpc import StatusCode

from ma_client import ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy
from tests.raw_client import FRAGMENT_SIZE_BYTES, Arrays, RawClient, Stream, fragments_of, push_header, until

if TYPE_CHECKING:
    from tests.conftest import StartServer

STEP = 3
# 5 fragments of 64 bytes; the first variable begins in one and ends in another.
CENTER: Arrays = {
    "w": np.arange(40, dtype=np.float32),
    "nothing": np.zeros((0, 4), np.float16),
    "scale": np.array(0.5),
    "half": np.arange(9, dtype=np.float16).reshape(3, 3),
    "brain": np.arange(31).astype(ml_dtypes.bfloat16),
    "last": np.zeros(0),
}
COUNT = len(fragments_of(CENTER))


def of(values: int) -> Arrays:
    """A worker's local variables, all different from the center's and from another worker's."""
    return {name: (value * 0 + values).astype(value.dtype) for name, value in CENTER.items()}


def worker(address: str, worker_id: str, **options: Any) -> ParameterServerSession:
    return ParameterServerSession([address], worker_id=worker_id, is_chief=worker_id == "chief", **options)


class Job:
    """A server with a center at STEP, and a raw client of it."""

    def __init__(
        self,
        client: RawClient,
        address: str,
        center: Arrays = CENTER,
        fragment_size_bytes: int = FRAGMENT_SIZE_BYTES,
    ) -> None:
        self.client, self.address = client, address
        self.manifest_id = client.initialize(center, STEP, fragment_size_bytes=fragment_size_bytes).manifest_id

    def header(self, worker_id: str, **fields: Any) -> pb.PushAndAverageRequest:
        return push_header(self.manifest_id, worker_id, **{"base_step": STEP, **fields})

    def admitted(
        self, worker_id: str, client: RawClient | None = None, **fields: Any
    ) -> tuple[Stream[pb.PushAndAverageResponse], int]:
        """Opens a push, sends only its header, and returns the first fragment that the server needs."""
        stream = (client or self.client).open_push()
        stream.send(self.header(worker_id, **fields))
        return stream, stream.admission()

    def push(self, worker_id: str, arrays: Arrays, **fields: Any) -> Stream[pb.PushAndAverageResponse]:
        """A whole push."""
        stream = self.client.open_push()
        stream.push(self.header(worker_id, **fields), arrays)
        return stream

    def break_off(self, worker_id: str, arrays: Arrays, given: int) -> None:
        """A push whose connection is lost after some fragments."""
        with RawClient(self.address) as client:
            stream, first = self.admitted(worker_id, client)
            stream.give(fragments_of(arrays), first, given)
            until(lambda: self.client.worker(worker_id).fragments_given == given, "the fragments came")

    def restarted(self, worker_id: str) -> tuple[Stream[pb.PushAndAverageResponse], int]:
        """A push of a new process, admitted once the server has noticed that the old one is gone."""
        while True:
            try:
                return self.admitted(worker_id, incarnation=b"another process!")
            except grpc.RpcError as error:
                if cast(grpc.Call, error).code() is not StatusCode.ALREADY_EXISTS:
                    raise

    def given(self, worker_id: str, count: int) -> None:
        """Waits until the server has this many fragments of a worker."""
        until(lambda: self.client.worker(worker_id).fragments_given == count, f"{worker_id} gave {count} fragments")

    def center(self) -> bytes:
        return self.client.pull()[1]


@contextmanager
def running(start_server: StartServer, policy: int | RoundPolicy = 2, **options: Any) -> Iterator[Job]:
    """A job with its own server; ``options`` are `start_server`'s."""
    address = start_server(policy, **options).address
    with RawClient(address) as client:
        yield Job(client, address)
