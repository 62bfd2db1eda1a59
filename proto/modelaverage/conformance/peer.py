"""The kit's own worker, which takes part beside the client. It uses the generated stubs and can stop in mid-push."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator
from typing import Any

import grpc

from modelaverage import wire
from modelaverage.codecs import codec_named
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.models import coded_fragments_of, decoded, fragments_of, manifest_of, unflatten
from modelaverage.manifest import Manifest
from modelaverage.v1 import parameter_server_pb2 as pb
from modelaverage.v1.parameter_server_pb2_grpc import ParameterServerStub

__all__ = ["Peer", "PeerPush"]

_TIMEOUT_S = 30.0


class Peer:
    """What the server takes for one worker's process; a restarted process is another `Peer`.

    Args:
        address: of the server.
        worker_id: the worker that it plays.
    """

    def __init__(self, address: str, worker_id: str) -> None:
        self.worker_id = worker_id
        self._incarnation = uuid.uuid4().bytes
        self._push_id = 0
        self._manifest_id = ""
        self._manifest: Manifest | None = None
        self._compression, self._center_id = "", 0
        self._center = b""
        self._pushes: list[PeerPush] = []  # a call that nothing refers to is cancelled
        # Channels do not share connections: each peer has one of its own.
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub: Any = ParameterServerStub(self._channel)  # type: ignore[no-untyped-call]

    def initialize(
        self,
        arrays: Arrays,
        global_step: int = 0,
        fragment_size_bytes: int = 64,
        outer_optimizer: str = "",
        compression: str = "",
    ) -> None:
        """Sets the center."""

        def requests() -> Iterator[pb.InitializeRequest]:
            manifest = wire.manifest_to_message(manifest_of(arrays, fragment_size_bytes))
            header = pb.InitializeHeader(
                worker_id=self.worker_id,
                manifest=manifest,
                global_step=global_step,
                outer_optimizer=outer_optimizer,
                compression=compression,
            )
            yield pb.InitializeRequest(header=header)
            for index, data in enumerate(fragments_of(arrays, fragment_size_bytes)):
                yield pb.InitializeRequest(fragment=pb.Fragment(index=index, data=data))

        assert self._stub.Initialize(requests(), timeout=_TIMEOUT_S).initialized

    def pull(self) -> tuple[int, bytes]:
        """`global_step` and the flat buffer of the center."""
        messages = self._stub.Pull(pb.PullRequest(worker_id=self.worker_id), timeout=_TIMEOUT_S)
        header: pb.CenterHeader = next(messages).header
        self._manifest_id, self._manifest = header.manifest_id, wire.manifest_from_message(header.manifest)
        self._compression, self._center_id = header.compression, header.center_id
        self._center = b"".join(message.fragment.data for message in messages)
        return header.global_step, self._center

    def begin_push(self, fragments: list[bytes], base_step: int, give: int | None = None, **fields: Any) -> PeerPush:
        """Begins a push and sends its first ``give`` fragments; None: all.

        Args:
            fragments: all of the push.
            base_step: the step of the center that they were trained from.
            give: how many of them to send now.
            fields: other fields of its header.
        """
        if not self._manifest_id:
            self.pull()
        self._push_id += 1
        header = pb.PushHeader(
            worker_id=self.worker_id,
            incarnation=self._incarnation,
            push_id=self._push_id,
            base_step=base_step,
            manifest_id=self._manifest_id,
            **fields,
        )
        push = PeerPush(self._stub, header, fragments)
        self._pushes.append(push)
        push.give(len(fragments) if give is None else give)
        return push

    def push(self, fragments: list[bytes], base_step: int) -> int:
        """Makes a whole push, and waits for the end of its round; returns the new `global_step`."""
        return self.begin_push(fragments, base_step).ended()

    def begin_coded_push(self, local: Arrays, base_step: int) -> PeerPush:
        """Begins a push in the job's codec, relative to the center that it has, and sends all of it."""
        assert self._manifest is not None
        fragments = coded_fragments_of(local, self.center, self._manifest.fragment_size_bytes, self._compression)
        return self.begin_push(fragments, base_step, codec=self._compression, base_center_id=self._center_id)

    def take_coded(self, push: PeerPush) -> Arrays:
        """Waits for the end of a push in the job's codec; its center is the next base."""
        push.ended()
        assert push.codec == self._compression, f"the kit's own push got a center in codec {push.codec!r}"
        assert self._manifest is not None
        self._center = decoded(codec_named(push.codec), self._manifest, push.came, self._center)
        self._center_id = push.outcome.center_id
        return self.center

    @property
    def center(self) -> Arrays:
        """The center that it has pulled, or taken from a push in the job's codec."""
        assert self._manifest is not None
        return unflatten(self._manifest, self._center)

    def status(self) -> pb.GetStatusResponse:
        """The server's status."""
        status: pb.GetStatusResponse = self._stub.GetStatus(pb.GetStatusRequest(), timeout=_TIMEOUT_S)
        return status

    def end(self) -> None:
        """Breaks off all its calls."""
        self._channel.close()


class PeerPush:
    """A peer's push that is under way.

    Attributes:
        codec: of the fragments that come.
        came: their bytes.
        outcome: once there is one.
    """

    def __init__(self, stub: Any, header: pb.PushHeader, fragments: list[bytes]) -> None:
        self._requests: queue.SimpleQueue[pb.PushAndAverageRequest | None] = queue.SimpleQueue()
        self._requests.put(pb.PushAndAverageRequest(header=header))
        self._messages = stub.PushAndAverage(iter(self._requests.get, None), timeout=_TIMEOUT_S)
        self._fragments = fragments
        self.came: list[bytes] = []
        self.outcome = pb.PushOutcome()
        admission = next(self._messages).admission
        self._given, self.codec = admission.first_needed_fragment, admission.codec

    def give(self, end: int) -> None:
        """Sends the fragments before ``end`` that have not been sent; half-closes after the last one."""
        for index in range(self._given, end):
            fragment = pb.Fragment(index=index, data=self._fragments[index])
            self._requests.put(pb.PushAndAverageRequest(fragment=fragment))
        self._given = max(self._given, end)
        if self._given == len(self._fragments):
            self._requests.put(None)

    def finish(self) -> int:
        """Sends the rest, and waits for the end of the round; returns the new `global_step`."""
        self.give(len(self._fragments))
        return self.ended()

    def ended(self) -> int:
        """Waits for the end of the round; returns the new `global_step`."""
        for message in self._messages:
            if message.HasField("fragment"):
                self.came.append(message.fragment.data)
            if message.HasField("outcome"):
                self.outcome = message.outcome
        assert self.outcome.outcome == pb.OUTCOME_COMMITTED, f"the kit's own push ended with {self.outcome}"
        return self.outcome.global_step
