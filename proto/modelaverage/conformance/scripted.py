"""A server for cases that a real server cannot produce: it sends exactly the messages of the case's script."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from modelaverage import wire
from modelaverage.conformance.lines import Arrays
from modelaverage.conformance.models import fragments_of, manifest_of
from modelaverage.errors import ACTION_METADATA_KEY, REASON_METADATA_KEY, Action
from modelaverage.v1 import parameter_server_pb2 as pb
from modelaverage.v1.parameter_server_pb2_grpc import ParameterServerServicer, add_ParameterServerServicer_to_server

__all__ = [
    "GotPush",
    "InCodec",
    "MANIFEST_ID",
    "READ",
    "Refusal",
    "ScriptedServer",
    "admission",
    "center",
    "chief_notice",
    "fragment",
    "outcome",
]

MANIFEST_ID = "of-the-script"
"""The id of a script's manifest, unless the script gives another."""
_WAIT_S = 20.0
_THREADS = 8
# A half-duplex client that sends nothing for this long is waiting for a message that never comes.
_HALF_DUPLEX_PAUSE_S = 3.0


@dataclass(frozen=True)
class Refusal:
    """How a call fails.

    Args:
        status: name of the gRPC status.
        reason: its name, for the trailing metadata; None: there is none.
        message: for people.
        action: the word for the trailing metadata; None: there is none.
    """

    status: str
    reason: str | None = None
    message: str = "as the script wants it"
    action: str | None = None


@dataclass
class GotPush:
    """A push that the server got.

    Args:
        header: its header.
        data: the bytes of its fragments, joined.
        indexes: of the first fragment in each message.
        half_closed: whether the client half-closed.
    """

    header: pb.PushHeader
    data: bytes = b""
    indexes: list[int] = field(default_factory=list)
    half_closed: bool = False

    @property
    def is_coded(self) -> bool:
        """Whether its fragments are in a codec."""
        return self.header.codec not in ("", "raw")

    @property
    def follows(self) -> bool:
        """Whether the client sends fragments without waiting for the admission: then every attempt sends all."""
        return self.header.fragments_follow or self.header.half_duplex


@dataclass(frozen=True)
class InCodec:
    """In the script of a push: a step that depends on the codec of its header.

    Args:
        coded: if the push is in a codec; None: nothing.
        raw: if it is raw; None: nothing.
    """

    coded: pb.PushAndAverageResponse | Refusal | None
    raw: pb.PushAndAverageResponse | Refusal | None = None


READ = None
"""In the script of a push: read until the client half-closes. A half-duplex client is sent nothing before that."""
_PullScript = Sequence[pb.PullResponse | Refusal]
_PushScript = Sequence["pb.PushAndAverageResponse | Refusal | InCodec | None"]


class ScriptedServer(ParameterServerServicer):
    """Answers every pull and every push with the next script in `pulls` or `pushes`; waits for one if there is none.

    It leaves out the notices in a pull's script if the client does not accept them, and the fragments that the client
    already has if it continues a pull. To a half-duplex client it sends the messages of a push's script only after the
    half-close, but a refusal at once. It splits combined messages unless the client accepts them.

    Attributes:
        address: HOST:PORT.
        pulls: the scripts of the next pulls.
        pushes: the scripts of the next pushes.
        initializations: how to answer each Initialize: None accepts it.
        phase: what a status says.
        outer_optimizer: what a status and the answer to an Initialize name.
        compression: the same, for the codec of the job.
        left: the calls of Leave.
    """

    def __init__(self) -> None:
        self.pulls: queue.SimpleQueue[_PullScript] = queue.SimpleQueue()
        self.pushes: queue.SimpleQueue[_PushScript] = queue.SimpleQueue()
        self.initializations: queue.SimpleQueue[Refusal | None] = queue.SimpleQueue()
        self.phase: pb.Phase = pb.PHASE_IDLE
        self.outer_optimizer = self.compression = ""
        self.left: queue.SimpleQueue[pb.LeaveRequest] = queue.SimpleQueue()
        self._got: queue.SimpleQueue[GotPush] = queue.SimpleQueue()
        self._got_center: queue.SimpleQueue[tuple[pb.InitializeHeader, bytes]] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(_THREADS), options=[("grpc.so_reuseport", 0)])
        add_ParameterServerServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def got_push(self) -> GotPush:
        """The next push, in the order in which they ended."""
        return self._got.get(timeout=_WAIT_S)

    def got_center(self) -> tuple[pb.InitializeHeader, bytes]:
        """The next Initialize that was accepted: its header, and its fragments joined."""
        return self._got_center.get(timeout=_WAIT_S)

    def end(self) -> None:
        """Ends the server and its calls, including those that wait for a script."""
        for _ in range(_THREADS):
            self.pulls.put([])
            self.pushes.put([])
        self._server.stop(grace=None)

    # The service.

    def Initialize(self, request_iterator: Iterator[pb.InitializeRequest], context: Any) -> pb.InitializeResponse:  # noqa: N802
        """Accepts a center, or refuses it after its header."""
        header = next(request_iterator).header
        refusal = self.initializations.get(timeout=_WAIT_S)
        if refusal is not None:
            _refuse(context, refusal)
        data = b"".join(message.fragment.data for message in request_iterator)
        self._got_center.put((header, data))
        return pb.InitializeResponse(
            initialized=True,
            global_step=header.global_step,
            manifest_id=MANIFEST_ID,
            num_workers=1,
            outer_optimizer=self.outer_optimizer,
            compression=self.compression,
        )

    def Pull(self, request: pb.PullRequest, context: Any) -> Iterator[pb.PullResponse]:  # noqa: N802
        """Plays the next script."""
        first = 0
        for step in self.pulls.get(timeout=_WAIT_S):
            if isinstance(step, Refusal):
                _refuse(context, step)
            if step.HasField("header") and step.header.global_step == request.continued_step:
                first = request.first_fragment
            unwanted = step.HasField("waiting") and not request.accepts_notices
            if not unwanted and not (step.HasField("fragment") and step.fragment.index < first):
                yield step

    def PushAndAverage(  # noqa: N802
        self, request_iterator: Iterator[pb.PushAndAverageRequest], context: Any
    ) -> Iterator[pb.PushAndAverageResponse]:
        """Plays the next script."""
        first = next(request_iterator)
        got = GotPush(first.header)
        _note(got, first)
        try:
            for step in self.pushes.get(timeout=_WAIT_S):
                if isinstance(step, InCodec):
                    step = step.coded if got.is_coded else step.raw
                    if step is None:
                        continue
                if isinstance(step, Refusal):
                    _refuse(context, step)
                if not got.half_closed and (step is READ or got.header.half_duplex):
                    _read(got, request_iterator, context)
                if step is not READ:
                    yield from [step] if got.header.accepts_combined else _one_by_one(step)
        finally:
            self._got.put(got)

    def Leave(self, request: pb.LeaveRequest, _: Any) -> pb.LeaveResponse:  # noqa: N802
        """Records the call."""
        self.left.put(request)
        return pb.LeaveResponse()

    def GetStatus(self, _: pb.GetStatusRequest, __: Any) -> pb.GetStatusResponse:  # noqa: N802
        """Always answers: some clients ask for the status first."""
        return pb.GetStatusResponse(
            phase=self.phase,
            global_step=7,
            num_workers=1,
            min_workers=1,
            outer_optimizer=self.outer_optimizer,
            compression=self.compression,
        )


def center(
    arrays: Arrays,
    global_step: int = 7,
    fragment_size_bytes: int = 64,
    manifest_id: str = MANIFEST_ID,
    outer_optimizer: str = "",
    compression: str = "",
    center_id: int = 0,
) -> list[pb.PullResponse]:
    """The script of a pull: the header and every fragment."""
    header = pb.CenterHeader(
        manifest=wire.manifest_to_message(manifest_of(arrays, fragment_size_bytes)),
        manifest_id=manifest_id,
        global_step=global_step,
        num_workers=1,
        outer_optimizer=outer_optimizer,
        compression=compression,
        center_id=center_id,
    )
    fragments = fragments_of(arrays, fragment_size_bytes)
    return [
        pb.PullResponse(header=header),
        *(pb.PullResponse(fragment=pb.Fragment(index=i, data=data)) for i, data in enumerate(fragments)),
    ]


def chief_notice(waited_s: float) -> pb.PullResponse:
    """A message that a pull may get before its header, while there is no center."""
    return pb.PullResponse(waiting=pb.ChiefNotice(waited_s=waited_s))


def admission(first_needed_fragment: int = 0) -> pb.PushAndAverageResponse:
    """The admission of a push."""
    return pb.PushAndAverageResponse(admission=pb.PushAdmission(first_needed_fragment=first_needed_fragment))


def fragment(arrays: Arrays, index: int, fragment_size_bytes: int = 64) -> pb.PushAndAverageResponse:
    """A fragment of an average."""
    data = fragments_of(arrays, fragment_size_bytes)[index]
    return pb.PushAndAverageResponse(fragment=pb.Fragment(index=index, data=data))


def outcome(
    global_step: int = 8,
    how: pb.Outcome = pb.OUTCOME_COMMITTED,
    contributors: tuple[str, ...] = ("a",),
    center_id: int = 0,
) -> pb.PushAndAverageResponse:
    """The outcome of a push."""
    message = pb.PushOutcome(outcome=how, global_step=global_step, contributors=contributors, center_id=center_id)
    return pb.PushAndAverageResponse(outcome=message)


def _note(got: GotPush, message: pb.PushAndAverageRequest) -> None:
    if message.HasField("fragment"):
        got.indexes.append(message.fragment.index)
        got.data += message.fragment.data


def _read(got: GotPush, messages: Iterator[pb.PushAndAverageRequest], context: Any) -> None:
    """Records what comes until the half-close. Refuses a half-duplex client that sends nothing for a while."""
    came: queue.SimpleQueue[pb.PushAndAverageRequest | None] = queue.SimpleQueue()

    def read() -> None:
        with suppress(Exception):  # the call has ended
            for message in messages:
                came.put(message)
        came.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (message := came.get(timeout=_HALF_DUPLEX_PAUSE_S if got.header.half_duplex else None)) is not None:
            _note(got, message)
    except queue.Empty:
        pause = f"nothing came for {_HALF_DUPLEX_PAUSE_S:g} s from a half-duplex client that has not half-closed"
        _refuse(context, Refusal("FAILED_PRECONDITION", None, pause, Action.STOP.value))
    got.half_closed = context.is_active()


def _one_by_one(message: pb.PushAndAverageResponse) -> Iterator[pb.PushAndAverageResponse]:
    """The parts of a combined message, each in a message of its own."""
    names = [field.name for field, _ in message.ListFields()]
    if len(names) < 2:
        yield message
        return
    for name in sorted(names, key=["admission", "fragment", "shared", "waiting", "outcome"].index):
        one = pb.PushAndAverageResponse()
        getattr(one, name).CopyFrom(getattr(message, name))
        yield one


def _refuse(context: Any, refusal: Refusal) -> NoReturn:
    told = (REASON_METADATA_KEY, refusal.reason), (ACTION_METADATA_KEY, refusal.action)
    context.set_trailing_metadata(tuple((key, value) for key, value in told if value is not None))
    context.abort(getattr(grpc.StatusCode, refusal.status), refusal.message)
    raise AssertionError("abort raises")
