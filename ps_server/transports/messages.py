"""Fragments in the call's own messages: the transport that every client supports."""

from __future__ import annotations

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.base import Content, Opening, PushCall, Run, Source
from ps_server.transports.data_connection import lost

__all__ = ["Messages", "MessagesLane"]


class MessagesLane:
    """A push whose fragments travel in the call's messages.

    Args:
        call: the call of the push.
        manifest: the manifest of the model.
    """

    is_shared = False

    def __init__(self, call: PushCall, manifest: Manifest) -> None:
        self._call = call
        self._longest_run = manifest.longest_run
        self._is_small = manifest.fragment_count == 1
        self.kind = pb.TRANSPORT_UNIX if call.peer.startswith("unix") else pb.TRANSPORT_TCP

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """Adds nothing."""

    def whole(self) -> Run | None:
        """The only fragment of a small model, if it came with the header. Raises ProtocolError."""
        return _run(self._call.content_at_hand()) if self._is_small else None

    async def receive(self) -> Run | None:
        """The fragments of the next message. Raises ProtocolError."""
        return _run(await self._call.read_content())

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """One fragment, or a run that ends at a multiple of the maximum run length, so that workers at the same pace
        receive the same runs."""
        return min(finished, (first // self._longest_run + 1) * self._longest_run) if runs else first + 1

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Returns the fragments for the next message."""
        return average.message(first, end)

    def answered(self, is_committed: bool) -> None:
        """Keeps nothing for the next push."""

    def close(self) -> None:
        """Closes nothing."""


def _run(content: Content | None) -> Run | None:
    """The fragments in a message. Raises ProtocolError."""
    if content is None:
        return None
    if isinstance(content, tuple):
        return Run(*content)
    raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "fragments are named, but no memory was lent to this push")


class Messages:
    """Opens a lane for every push, so it must be asked last."""

    def open(self, opening: Opening) -> MessagesLane:
        """Opens a lane. Raises RetryPushError (DATA_CONNECTION_LOST) if the header names another transport."""
        wanted = opening.header.uses_transport
        if wanted:
            raise lost(f"this server has no transport {wanted[:40]!r}")
        return MessagesLane(opening.call, opening.manifest)

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Offers nothing: every client supports messages."""

    def keep_only(self, worker_ids: frozenset[str]) -> None:
        """Keeps nothing."""

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """Keeps nothing."""

    def close(self) -> None:
        """Closes nothing."""
