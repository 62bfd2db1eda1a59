"""The interface of a transport, which carries the bytes of pushes. One file each; the push loop knows none of them.

A *transport* lives as long as the server. It reads the header of each push. If the push uses it, it opens a *lane*, its
side of that one push. The lane delivers ascending runs of encoded fragments and sends finished ranges of the average.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from modelaverage.codecs import Codec
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Aside", "Content", "Lane", "Opening", "PushCall", "Run", "Source", "Transport"]

Content = tuple[int, memoryview] | pb.SharedFragments
"""The content of a push message: the first index and the bytes of a run, or a reference to fragments elsewhere."""


# Named tuples, because a frozen dataclass takes several times as long to make, and there is one for every message.
class Run(NamedTuple):
    """Consecutive fragments of a push.

    Args:
        first: index of the first one.
        data: their encoded bytes, concatenated.
        stays: whether the bytes stay valid and unchanged until the round is over.
    """

    first: int
    data: memoryview
    stays: bool = False


class Aside(Protocol):
    """A channel for bytes outside a call's stream, as the call's watchdog sees it. Times: event loop, seconds."""

    heard_at_s: float
    """When bytes last arrived."""
    taken_at_s: float
    """When bytes were last sent."""

    def look(self) -> None:
        """Notes bytes that have moved unseen."""

    def stalled(self, why: str) -> ModelAverageError:
        """The error for a push whose bytes stopped moving here."""


class Source(Protocol):
    """An average whose finished fragments can be read."""

    @property
    def segment(self) -> Segment | None:
        """The shared memory that holds it; None: private memory."""

    def data(self, first: int, end: int) -> Sequence[memoryview]:
        """Encoded fragments ``first`` to ``end`` - 1, as pieces of bytes to be joined."""

    def message(self, first: int, end: int) -> bytes:
        """The same fragments as one message of the call."""


class PushCall(Protocol):
    """The part of a push's call that a lane may use."""

    @property
    def peer(self) -> str:
        """The client's address, as gRPC writes it, such as ``ipv4:10.0.0.7:51234``."""

    def content_at_hand(self) -> Content | None:
        """Takes the content that came in the header's own message; None: it had none."""

    async def read_content(self) -> Content | None:
        """The content of the client's next message; None once it has half-closed. Raises ProtocolError."""

    async def read_aside(self, aside: Aside, reading: Awaitable[None]) -> None:
        """Waits for bytes that arrive outside the call's stream."""

    async def write_aside(self, aside: Aside, writing: Awaitable[None]) -> None:
        """Waits until bytes are sent outside the call's stream."""


class Opening(NamedTuple):
    """A push whose header has arrived.

    Args:
        header: the push header.
        call: the call of the push.
        manifest: the manifest of the model.
        codec: encodes its fragments.
    """

    header: pb.PushHeader
    call: PushCall
    manifest: Manifest
    codec: Codec


class Lane(Protocol):
    """A transport's side of one push."""

    @property
    def kind(self) -> pb.Transport:
        """How the fragments travel, for the status."""

    @property
    def is_shared(self) -> bool:
        """Whether the bytes lie in shared memory, for the traffic counters."""

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """The push is in the round: adds to the admission what the client needs to use this lane."""

    def whole(self) -> Run | None:
        """Takes all fragments of the push, if they came with its header; nothing is left to receive then."""

    async def receive(self) -> Run | None:
        """The next run; None once the client has sent everything.

        Raises:
            ModelAverageError: the data breaks the protocol, or the transport failed.
        """

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """Chooses how many finished fragments to send at once.

        Args:
            first: the first fragment not yet sent.
            finished: all fragments below this index are finished.
            runs: whether the client accepts several fragments in one message.

        Returns:
            The index after the last fragment to send.
        """

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Sends a finished range of the average.

        Returns:
            Bytes for the call's next message; empty if the range was sent outside the call.
        """

    def answered(self, is_committed: bool) -> None:
        """The outcome is about to be sent and nothing follows it; the next push may arrive at once."""

    def close(self) -> None:
        """The push has ended, successfully or not."""


class Transport(Protocol):
    """Carries the bytes of pushes. Used on one event loop."""

    def open(self, opening: Opening) -> Lane | None:
        """Opens the lane of a push; None: the push does not use this transport.

        Raises:
            RetryPushError: DATA_CONNECTION_LOST: the push asks for this transport, but its resources are gone.
        """

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Adds to the admission what the client needs to use this transport for later pushes."""

    def keep_only(self, worker_ids: frozenset[str]) -> None:
        """A round has committed with these workers: resources of other workers may be freed."""

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """The worker's process leaves."""

    def close(self) -> None:
        """The server ends."""
