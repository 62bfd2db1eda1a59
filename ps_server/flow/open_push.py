"""One push while it is served."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from modelaverage.codecs import RAW, Codec
from modelaverage.errors import Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.purpose import Purpose
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Reader
from ps_server.flow.average import Average
from ps_server.flow.call import Call
from ps_server.rules.decisions import Push
from ps_server.seen.observations import Sending
from ps_server.transports.base import Lane

__all__ = ["Manner", "OpenPush", "push_of"]

# By number on the wire; a header without one contributes.
_PURPOSES = {0: Purpose.CONTRIBUTE, **{purpose.value: purpose for purpose in Purpose}}


class Manner(NamedTuple):
    """Options of a client for its push.

    Args:
        follows: its fragments follow the header without waiting for the admission.
        takes_runs: one message may carry several fragments of the average.
        takes_combined: admission, fragments and outcome may share a message.
        is_half_duplex: the client reads nothing before it has half-closed.
    """

    follows: bool
    takes_runs: bool
    takes_combined: bool
    is_half_duplex: bool

    @classmethod
    def of(cls, header: pb.PushHeader) -> Manner:
        """The options in a push header."""
        beside = header.uses_data_connection or bool(header.uses_transport)
        return cls(
            header.fragments_follow or header.half_duplex or beside,
            header.accepts_runs,
            header.accepts_combined,
            header.half_duplex,
        )


@dataclass(eq=False)
class OpenPush:
    """One push while it is served.

    Attributes:
        lane: carries its fragments and the average.
        codec: encodes both.
        average: the average that it waits for.
        reader: reads the average.
        outcome: set when its round has committed and the outcome may be sent.
        sending: the responses of that round.
        is_admitted: whether its round has admitted it.
        is_held: whether it waits for the end of a round that it is not in.
        notice: a notice to be sent.
        progress: set when there is something to send.
    """

    call: Call
    worker_id: str
    incarnation: bytes
    manner: Manner
    lane: Lane
    codec: Codec
    average: Average
    reader: Reader
    outcome: pb.PushOutcome | None = None
    sending: Sending | None = None
    is_admitted: bool = False
    is_held: bool = False
    notice: pb.WaitingNotice | None = None
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_aside(self) -> bool:
        """Whether its bytes use a data connection."""
        return self.lane.kind == pb.TRANSPORT_DATA_CONNECTION

    @property
    def needs_changes(self) -> bool:
        """Whether it gets the average as changes from the center before."""
        return self.is_admitted and self.codec is not RAW and not self.lane.is_shared

    @property
    def lacks_changes(self) -> bool:
        """Whether it waits for changes that there will not be: its call ends with BASE_UNKNOWN."""
        return self.needs_changes and not self.average.is_coded


def _purpose_of(header: pb.PushHeader) -> Purpose:
    purpose = _PURPOSES.get(header.purpose)
    if purpose is None:
        known = ", ".join(f"{purpose.value} ({purpose.name})" for purpose in Purpose)
        raise refusal(
            Reason.MESSAGE_MALFORMED,
            f"{header.worker_id[:128]!r} pushes with purpose {header.purpose}; the server knows {known}",
        )
    return purpose


def push_of(header: pb.PushHeader, manifest: Manifest) -> Push:
    """The push that a header describes, checked against the current manifest.

    Raises:
        InvalidRequestError: UNTOUCHED_INVALID, or those of `Push`.
        ConflictError: MANIFEST_UNKNOWN.
    """
    # Reads at most one more index than is valid, because a hostile header may have millions.
    untouched = tuple(header.untouched_variables[: len(manifest.variables) + 1])
    push = Push(
        header.worker_id,
        header.incarnation,
        header.push_id,
        header.base_step,
        header.weight if header.HasField("weight") else 1.0,
        frozenset(untouched),
        _purpose_of(header),
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
