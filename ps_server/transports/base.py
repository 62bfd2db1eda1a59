"""What a transport is: a way for the bytes of pushes. One file each; the loop that serves a push knows none of them.

A *transport* lives as long as the server. It looks at the header of each push; if the push uses it, it gives a *lane*:
the transport's end of that one push, which brings ascending runs of encoded fragments and takes finished ranges of the
average.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelaverage.codecs import Codec
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Aside", "Content", "Lane", "Opening", "PushCall", "Run", "Source", "Transport"]

Content = tuple[int, memoryview] | pb.SharedFragments
"""What a message of a push carries: the first index and the bytes of a run, or the names of fragments elsewhere."""


@dataclass(frozen=True)
class Run:
    """Consecutive fragments of a push.

    Args:
        first: index of the first one.
        data: their encoded bytes, one behind the other.
        stays: whether the bytes stay as they are until the round is over.
    """

    first: int
    data: memoryview
    stays: bool = False


class Aside(Protocol):
    """Where bytes move beside a call, as the call's watchdog sees it. Times are the event loop's, in seconds."""

    heard_at_s: float
    """When bytes last came."""
    taken_at_s: float
    """When bytes last went."""

    def stalled(self, why: str) -> ModelAverageError:
        """What ends a push whose bytes stopped moving here."""


class Source(Protocol):
    """An average, as far as it is finished."""

    @property
    def segment(self) -> Segment | None:
        """The shared memory that it lies in, if it does."""

    def data(self, first: int, end: int) -> Sequence[memoryview]:
        """Consecutive encoded fragments, up to but not with ``end``; bytes to be joined."""

    def message(self, first: int, end: int) -> bytes:
        """The same as a message of the call."""


class PushCall(Protocol):
    """What a lane may do with the call of its push."""

    @property
    def peer(self) -> str:
        """Where the client is, as gRPC names it, such as ``ipv4:10.0.0.7:51234``."""

    async def read_content(self) -> Content | None:
        """What the client's next message carries; None once it has half-closed. Raises ProtocolError."""

    async def read_aside(self, aside: Aside, reading: Awaitable[None]) -> None:
        """Waits for bytes that come beside the call."""

    async def write_aside(self, aside: Aside, writing: Awaitable[None]) -> None:
        """Waits for bytes that go beside the call."""


@dataclass(frozen=True)
class Opening:
    """A push whose header has come.

    Args:
        header: what it says.
        call: of the push.
        manifest: of the model.
        codec: how its fragments are coded.
    """

    header: pb.PushHeader
    call: PushCall
    manifest: Manifest
    codec: Codec


class Lane(Protocol):
    """A transport's end of one push."""

    @property
    def kind(self) -> pb.Transport:
        """How the fragments come, for the status."""

    @property
    def is_shared(self) -> bool:
        """Whether the bytes lie in shared memory, for the account of the traffic."""

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """The push is in the round: adds what the client needs to know to the admission."""

    async def receive(self) -> Run | None:
        """The next run; None once the client has sent all that it is going to.

        Raises:
            ModelAverageError: what came breaks the protocol, or the transport is broken.
        """

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """How much of what is finished goes at once.

        Args:
            first: the first fragment that is still to go.
            finished: fragments before this one are finished.
            runs: whether the client takes several fragments in one message.

        Returns:
            The fragment after the last one.
        """

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Sends a finished range of the average.

        Returns:
            What belongs into the call's next message; empty: the range went beside the call.
        """

    def answered(self, is_committed: bool) -> None:
        """The outcome is about to be told, and nothing else will be sent: the next push may come at once."""

    def close(self) -> None:
        """The push has ended, in whatever way."""


class Transport(Protocol):
    """A way for the bytes of pushes. Used on one event loop."""

    def open(self, opening: Opening) -> Lane | None:
        """The lane of a push; None: the push does not use this transport.

        Raises:
            RetryPushError: DATA_CONNECTION_LOST: it wants to, and what it needs is not there (any more).
        """

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Adds to the admission of any push what its client may use for its next ones, if it wants to."""

    def keep_only(self, worker_ids: frozenset[str]) -> None:
        """A round has committed with these workers: what is kept for others may go."""

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """The worker's process goes."""

    def close(self) -> None:
        """The server ends."""
