"""One push that is being answered, and the average that it waits for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import lru_cache

from modelaverage import wire
from modelaverage.errors import Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Buffer, Reader
from ps_server.flow.call import Call
from ps_server.rules.decisions import Push
from ps_server.seen.observations import Sending
from ps_server.transports.data_port import DataConnection

__all__ = ["Average", "Part", "push_of", "shared_memory_message"]

_MESSAGES_KEPT = 8
_CODECS = ("", "raw")


@dataclass
class Average:
    """The average in the making, or just made: fragments below ``finished`` of ``buffer`` may be sent."""

    buffer: Buffer
    finished: int = 0

    def __post_init__(self) -> None:
        buffer = self.buffer
        # Workers that keep pace are sent the same bytes, so they are made once.
        self.message = lru_cache(_MESSAGES_KEPT)(
            lambda first, end: wire.encode_fragment(first, (buffer.fragments(first, end),))
        )


@dataclass(eq=False)
class Part:
    """One push that is being answered."""

    call: Call
    worker_id: str
    incarnation: bytes
    average: Average
    reader: Reader
    follows: bool = False  # whether its fragments come without waiting for the admission
    runs: bool = False  # whether several fragments of the average may go in one message
    combined: bool = False  # whether the admission, fragments and the outcome may share a message
    half_duplex: bool = False  # whether nothing may be sent before the client has half-closed
    contribution: Segment | None = None  # where the worker may put its fragments
    shared: bool = False  # whether it does
    offer: pb.DataConnection | None = None  # a data connection for later pushes
    connection: DataConnection | None = None  # where its fragments come, and the average goes
    is_drained: bool = False  # whether all that the worker sent there has been read
    outcome: pb.PushOutcome | None = None  # set when its round has committed, and may be known
    sending: Sending | None = None  # the answers of that round
    held: bool = False  # whether it waits for the end of a round that it is not in
    notice: pb.WaitingNotice | None = None  # to be sent
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def transport(self) -> pb.Transport:
        """How its fragments come."""
        if self.shared:
            return pb.TRANSPORT_SHARED_MEMORY
        if self.connection is not None:
            return pb.TRANSPORT_DATA_CONNECTION
        return pb.TRANSPORT_UNIX if self.call.peer.startswith("unix") else pb.TRANSPORT_TCP


def shared_memory_message(segment: Segment) -> pb.SharedMemory:
    """Where a client finds a segment."""
    address = segment.address
    return pb.SharedMemory(path=address.path, nonce=address.nonce)


def push_of(header: pb.PushHeader, manifest: Manifest) -> Push:
    """What a header says, checked against the manifest in force."""
    # One more than there can be is enough to see that they are too many: there may be millions.
    untouched = tuple(header.untouched_variables[: len(manifest.variables) + 1])
    push = Push(
        header.worker_id,
        header.incarnation,
        header.push_id,
        header.base_step,
        header.weight if header.HasField("weight") else 1.0,
        frozenset(untouched),
    )
    if header.codec not in _CODECS:
        raise refusal(
            Reason.CODEC_UNKNOWN,
            f"{push.worker_id!r} pushes with codec {header.codec[:40]!r}, which this server does not know; push raw",
        )
    if header.manifest_id != manifest.id:
        raise refusal(
            Reason.MANIFEST_UNKNOWN,
            f"{push.worker_id!r} pushes manifest {header.manifest_id[:40]!r}, but {manifest.id!r} is in force; "
            "pull, and compare the variables",
        )
    if list(untouched) != sorted(push.untouched) or any(number >= len(manifest.variables) for number in untouched):
        raise refusal(
            Reason.UNTOUCHED_INVALID,
            f"untouched variables are not ascending indexes below {len(manifest.variables)}: {untouched[:10]}",
        )
    return push
