"""The interface of a transport, which carries the bytes of pushes; the counterpart of the server's transports. One file
each, and one line in `registry.TRANSPORTS`.

A `ClientTransport` lasts as long as the connection to its server, and remembers what the next push may use. Each push
that uses it gets a `ClientLane`. A transport without header fields of its own is announced by name: it adds its name to
`accepts_transports`, finds its `TransportOffer` in an admission, and sets `uses_transport` in later pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ma_client.transports.lent_memory import Loan
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.staging import Staging
from ma_client.values.same import PushedBytes
from modelaverage.codecs import RAW, Codec
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ClientLane", "ClientTransport", "Ending", "OutgoingPush"]


class OutgoingPush(NamedTuple):
    """What is known of a push before its header is sent.

    Args:
        push_id: its number.
        variables: the bytes of the local variables, in manifest order (`PushedBytes` keeps its fragments for the next
            round); empty if it has no fragments.
        staging: receives the center, unless a transport puts it elsewhere; until then it has the base of the codec.
        codec: encodes fragments, except in shared memory.
        has_fragments: False: the push sends no fragments; only the center is received.
        may_follow: the server is known to need all fragments, so they may be sent before it asks.
        moved: counts the bytes of fragments.
    """

    push_id: int
    variables: Sequence[memoryview]
    staging: Staging
    codec: Codec
    has_fragments: bool
    may_follow: bool
    moved: LinkBytes

    @property
    def manifest(self) -> Manifest:
        """The manifest of the model."""
        return self.staging.manifest

    def fragment(self, index: int) -> Sequence[memoryview]:
        """A fragment to be sent, encoded, as parts to be joined. Every call counts its bytes."""
        if self.codec is RAW:
            return self.raw_fragment(index)
        return self._counted(self.codec.encode_variables(self.manifest, index, self.variables, self.staging.flat))

    def raw_fragment(self, index: int) -> Sequence[memoryview]:
        """The same as it lies in memory."""
        if isinstance(self.variables, PushedBytes):
            return self._counted(self.variables.fragment_parts(self.manifest, index))
        return self._counted(RAW.encode_variables(self.manifest, index, self.variables))

    def _counted(self, parts: Sequence[memoryview]) -> Sequence[memoryview]:
        self.moved.sent += sum(map(len, parts))
        return parts


class ClientLane:
    """A transport's side of one push. Subclasses override the methods that differ.

    Attributes:
        at_once: whether the fragments are sent without waiting for the admission.
        is_beside: whether fragments and center travel outside the call's stream.
    """

    at_once: bool = False
    is_beside: bool = False

    @property
    def loan(self) -> Loan | None:
        """The lent memory that holds the center; None: the center is in the staging buffer."""
        return None

    def announce(self, header: pb.PushHeader) -> None:
        """Sets in the header how the fragments travel."""

    def prepare(self) -> bool:
        """Does part of the work possible before the admission; False: none is left. On the sending thread."""
        return False

    def up(self, first: int) -> Iterator[bytes]:  # noqa: ARG002
        """The messages of the call for the fragments from ``first`` on. On the sending thread."""
        return iter(())

    def down(self, message: pb.PushAndAverageResponse) -> tuple[int, int] | None:
        """The fragments of the center that a message reports on this lane, as (first, count)."""

    def begun(self, give_up: Callable[[], object]) -> None:
        """The call has begun; ``give_up`` ends it."""

    def rest(self, goes_on: Callable[[], bool]) -> object | None:
        """Waits for bytes outside the call while they move and ``goes_on``. Returns why they did not arrive, or
        None."""

    def end(self, ending: Ending) -> ModelAverageError | None:
        """Ends the push. Returns a more precise exception to raise instead of the fault, if there is one."""


class Ending(NamedTuple):
    """How a push ended.

    Args:
        fault: the error to be raised; None: no error, or none with a reason.
        is_done: whether the center has arrived completely.
        is_stopped: whether the session ended the push.
    """

    fault: ModelAverageError | None
    is_done: bool
    is_stopped: bool


class ClientTransport:
    """Carries the bytes of pushes to one server. Subclasses override the methods that they need."""

    def begin(self, opening: OutgoingPush) -> ClientLane | None:
        """A push begins. Returns its lane if it may use this transport before the server has answered."""

    def announce(self, header: pb.PushHeader, opening: OutgoingPush, is_free: bool) -> None:
        """Announces this transport in the header. ``is_free``: the push itself begins in messages."""

    def admitted(self, admission: pb.PushAdmission, is_free: bool) -> ClientLane | None:
        """Takes an offer from an admission: for this push, whose lane is returned, or for later ones. ``is_free``: no
        other transport has taken this push."""

    def failed(self, fault: ModelAverageError) -> None:
        """A push failed with this error, on any transport."""

    def close(self) -> None:
        """Closes the transport; no push follows."""
