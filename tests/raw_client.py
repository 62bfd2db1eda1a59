"""A client that speaks the protocol by hand, so that it can break every rule of it.

It knows only the .proto: it makes layout, fragments and messages again, independently of the code under test.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import grpc
import ml_dtypes
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal_metadata, told_reason
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = [
    "Arrays",
    "FRAGMENT_SIZE_BYTES",
    "RawClient",
    "Refusal",
    "Stream",
    "flat_bytes",
    "fragment",
    "fragments_of",
    "initialize_header",
    "manifest_of",
    "push_header",
    "until",
]

Array = NDArray[Any]
Arrays = Mapping[str, Array]
M = TypeVar(
    "M",
    pb.InitializeResponse,
    pb.PullResponse,
    pb.PushAndAverageResponse,
    pb.GetStatusResponse,
    pb.JoinResponse,
    pb.LeaveResponse,
)

# No call of a test lasts longer, so a call that hangs fails.
DEADLINE_S = 20.0
FRAGMENT_SIZE_BYTES = 64
_DATA_TYPES = {
    np.dtype(np.float32): pb.DATA_TYPE_FLOAT32,
    np.dtype(np.float64): pb.DATA_TYPE_FLOAT64,
    np.dtype(np.float16): pb.DATA_TYPE_FLOAT16,
    np.dtype(ml_dtypes.bfloat16): pb.DATA_TYPE_BFLOAT16,
}


def until(condition: Callable[[], bool], what: str) -> None:
    """Asks again and again, for a bounded time, until the condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.005)


def manifest_of(arrays: Arrays, fragment_size_bytes: int = FRAGMENT_SIZE_BYTES) -> pb.Manifest:
    variables = [
        pb.Variable(name=name, data_type=_DATA_TYPES[array.dtype], shape=array.shape) for name, array in arrays.items()
    ]
    return pb.Manifest(variables=variables, fragment_size_bytes=fragment_size_bytes)


def flat_bytes(arrays: Arrays) -> bytes:
    flat = b""
    for array in arrays.values():
        if array.size:
            flat += bytes(-len(flat) % 8) + array.tobytes()
    return flat


def fragments_of(arrays: Arrays, fragment_size_bytes: int = FRAGMENT_SIZE_BYTES) -> list[bytes]:
    flat = flat_bytes(arrays)
    return [flat[at : at + fragment_size_bytes] for at in range(0, len(flat), fragment_size_bytes)]


def fragment(index: int, data: bytes) -> pb.PushAndAverageRequest:
    """A message with a fragment; on the wire, that of Initialize is the same."""
    return pb.PushAndAverageRequest(fragment=pb.Fragment(index=index, data=data))


def initialize_header(manifest: pb.Manifest, worker_id: str = "chief", global_step: int = 0) -> pb.InitializeRequest:
    return pb.InitializeRequest(
        header=pb.InitializeHeader(worker_id=worker_id, manifest=manifest, global_step=global_step)
    )


def push_header(manifest_id: str, worker_id: str, **fields: Any) -> pb.PushAndAverageRequest:
    """A correct header, with ``fields`` changed."""
    right: dict[str, Any] = {"incarnation": b"0123456789abcdef", "push_id": 1}
    return pb.PushAndAverageRequest(
        header=pb.PushHeader(worker_id=worker_id, manifest_id=manifest_id, **{**right, **fields})
    )


@dataclass(frozen=True)
class Refusal:
    """How a call failed; the reason without its prefix, empty if the server gave none."""

    code: grpc.StatusCode
    reason: str
    message: str


class Stream(Generic[M]):
    """One call of any kind; the test decides when each message is sent."""

    def __init__(self, channel: grpc.Channel, rpc: str, response_type: type[M]) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # On the wire, a unary side is a stream of one message.
        method = channel.stream_stream(
            f"/modelaverage.v1.ParameterServer/{rpc}", lambda message: message, response_type.FromString
        )
        self._call = method(cast("Iterator[bytes]", iter(self._requests.get, None)), timeout=DEADLINE_S)
        self._responses: Iterator[M] = iter(self._call)

    def send(self, *messages: Message | bytes) -> None:
        for message in messages:
            self._requests.put(message if isinstance(message, bytes) else message.SerializeToString())

    def half_close(self) -> None:
        self._requests.put(None)

    def cancel(self) -> None:
        self._call.cancel()  # type: ignore[no-untyped-call]
        self.half_close()

    def receive(self) -> M:
        """The next message."""
        return next(self._responses)

    def ended(self) -> bool:
        """Waits for the server's side to end; returns whether it ended well and without a further message."""
        return next(self._responses, None) is None

    def refusal(self) -> Refusal:
        """Waits for the call to fail, whatever messages come before."""
        try:
            for _ in self._responses:
                pass
        except grpc.RpcError as error:
            failure = cast(grpc.Call, error)
            metadata = failure.trailing_metadata()
            reason = told_reason(metadata)
            assert not reason or set(refusal_metadata(Reason[reason])) <= set(metadata or ())
            return Refusal(failure.code(), reason, failure.details())
        raise AssertionError("the call was not refused")

    # A push, step by step.

    def admission(self: Stream[pb.PushAndAverageResponse]) -> int:
        """The first fragment that the server wants."""
        message = self.receive()
        assert message.HasField("admission")
        return message.admission.first_needed_fragment

    def give(self, fragments: list[bytes], first: int = 0, end: int | None = None) -> None:
        """Sends the fragments from ``first`` to before ``end``."""
        for index in range(first, len(fragments) if end is None else end):
            self.send(fragment(index, fragments[index]))

    def push(self: Stream[pb.PushAndAverageResponse], header: pb.PushAndAverageRequest, arrays: Arrays) -> int:
        """Makes a whole, correct push; returns the first fragment that the server wanted."""
        self.send(header)
        first = self.admission()
        self.give(fragments_of(arrays), first)
        self.half_close()
        return first

    def answer(self: Stream[pb.PushAndAverageResponse]) -> tuple[pb.PushOutcome, bytes]:
        """The outcome, and the center that came before it."""
        flat, count = b"", 0
        message = pb.PushAndAverageResponse()
        while not message.HasField("outcome"):
            message = self.receive()
            if message.HasField("fragment"):
                assert message.fragment.index == count
                flat, count = flat + message.fragment.data, count + 1
        assert self.ended()
        return message.outcome, flat


class RawClient:
    """A client with its own connection to one server."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._streams: list[Stream[Any]] = []

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.cancel()
        self._channel.close()

    def _open(self, rpc: str, response_type: type[M]) -> Stream[M]:
        self._streams.append(Stream(self._channel, rpc, response_type))
        return cast("Stream[M]", self._streams[-1])

    def open_initialize(self) -> Stream[pb.InitializeResponse]:
        return self._open("Initialize", pb.InitializeResponse)

    def open_pull(self) -> Stream[pb.PullResponse]:
        return self._open("Pull", pb.PullResponse)

    def open_push(self) -> Stream[pb.PushAndAverageResponse]:
        return self._open("PushAndAverage", pb.PushAndAverageResponse)

    def open_status(self) -> Stream[pb.GetStatusResponse]:
        return self._open("GetStatus", pb.GetStatusResponse)

    def open_join(self) -> Stream[pb.JoinResponse]:
        return self._open("Join", pb.JoinResponse)

    def open_leave(self) -> Stream[pb.LeaveResponse]:
        return self._open("Leave", pb.LeaveResponse)

    # Whole, correct calls.

    def initialize(
        self, arrays: Arrays, global_step: int = 0, fragment_size_bytes: int = FRAGMENT_SIZE_BYTES
    ) -> pb.InitializeResponse:
        stream = self.open_initialize()
        stream.send(initialize_header(manifest_of(arrays, fragment_size_bytes), global_step=global_step))
        stream.give(fragments_of(arrays, fragment_size_bytes))
        stream.half_close()
        return stream.receive()

    def pull(self) -> tuple[pb.CenterHeader, bytes]:
        """The header and the flat buffer."""
        stream = self.open_pull()
        stream.send(pb.PullRequest(worker_id="a"))
        stream.half_close()
        header = stream.receive()
        assert header.WhichOneof("message") == "header"
        return header.header, rest_of_center(stream)

    def status(self) -> pb.GetStatusResponse:
        stream = self.open_status()
        stream.send(pb.GetStatusRequest())
        stream.half_close()
        return stream.receive()

    def worker(self, worker_id: str) -> pb.WorkerStatus:
        """The status of one worker; empty if the server has not heard of it."""
        return next((w for w in self.status().workers if w.worker_id == worker_id), pb.WorkerStatus())


def rest_of_center(stream: Stream[pb.PullResponse]) -> bytes:
    """The fragments after the header, in their order."""
    flat = list[bytes]()
    while (message := next(stream._responses, None)) is not None:
        assert message.WhichOneof("message") == "fragment"
        assert message.fragment.index == len(flat)
        flat.append(message.fragment.data)
    return b"".join(flat)
