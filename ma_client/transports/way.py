"""What a way for a push's bytes looks like to the push loop. Each way is one file, and one line in `ways.WAYS`.

A `Way` lasts as long as the connection to its server and remembers what the next push may use. It gives each push that
goes this way a `Trip`. A way without header fields of its own goes by name: it adds its name to `accepts_transports`,
finds its `TransportOffer` in an admission, and names itself in `uses_transport` of later pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ma_client.transports.lent_memory import Loan
from ma_client.transports.staging import FragmentSource, Staging
from modelaverage.codecs import Codec
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Ending", "OutgoingPush", "Trip", "Way"]


@dataclass(frozen=True)
class OutgoingPush:
    """What is known of a push before its header goes.

    Args:
        push_id: its number.
        fragments: the bytes of every fragment, as parts.
        staging: where the center arrives, unless a way has another place for it.
        codec: how fragments in messages are coded.
        has_fragments: False: the push has nothing to give; only the center comes.
        may_follow: the server will ask for all fragments, so they may go before it does.
    """

    push_id: int
    fragments: FragmentSource
    staging: Staging
    codec: Codec
    has_fragments: bool
    may_follow: bool

    @property
    def manifest(self) -> Manifest:
        """Of the model."""
        return self.staging.manifest


class Trip:
    """One push on its way. A way's own trip overrides what differs there.

    Attributes:
        at_once: whether the fragments go without waiting for the admission.
        is_beside: whether they go, and the center comes, beside the call.
    """

    at_once: bool = False
    is_beside: bool = False

    @property
    def loan(self) -> Loan | None:
        """The memory that the center lies in; None: it lies in the staging."""
        return None

    def announce(self, header: pb.PushHeader) -> None:
        """Says in the header how the fragments come."""

    def prepare(self) -> bool:
        """Does a part of what can be done before the admission; False: nothing is left. On the sending thread."""
        return False

    def up(self, first: int) -> Iterator[bytes]:  # noqa: ARG002
        """The messages of the call for the fragments from ``first`` on. On the sending thread."""
        return iter(())

    def down(self, message: pb.PushAndAverageResponse) -> tuple[int, int] | None:
        """Which fragments of the center, as (first, count), a message says have come this way."""

    def begun(self, give_up: Callable[[], object]) -> None:
        """The call is under way; ``give_up`` ends it."""

    def rest(self, goes_on: Callable[[], bool]) -> object | None:
        """Waits for bytes beside the call while they move and ``goes_on``; why they did not come, None if they did."""

    def end(self, ending: Ending) -> ModelAverageError | None:
        """The push is over. Returns the exception to raise instead of the fault, if this way knows better."""


@dataclass(frozen=True)
class Ending:
    """How a push ended.

    Args:
        fault: what is raised; None: nothing, or no fault of the table's.
        is_done: whether the center is whole.
        is_stopped: whether the session has ended it.
    """

    fault: ModelAverageError | None
    is_done: bool
    is_stopped: bool


class Way:
    """One way for the bytes of pushes to one server. Each way overrides the moments that concern it."""

    def begin(self, opening: OutgoingPush) -> Trip | None:
        """A push begins; its trip, if it may go this way before the server has said anything."""

    def announce(self, header: pb.PushHeader, opening: OutgoingPush, is_free: bool) -> None:
        """Says in the header that this way could be used. ``is_free``: the push itself goes in messages."""

    def admitted(self, admission: pb.PushAdmission, is_free: bool) -> Trip | None:
        """Takes what an admission offers: for this push, then its trip is returned, or for later ones. ``is_free``: no
        other way has taken this push's offer."""

    def failed(self, fault: ModelAverageError) -> None:
        """A push failed so, by whichever way it went."""

    def close(self) -> None:
        """There will be no other push."""
