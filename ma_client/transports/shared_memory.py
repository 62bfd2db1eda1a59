"""Fragments in memory that a server on this host lends: they are copied there, and the call refers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ma_client.transports.base import ClientLane, ClientTransport, Ending, OutgoingPush
from ma_client.transports.lent_memory import Copying, LentMemory, Loan
from modelaverage.errors import ModelAverageError
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ClientMemoryLane", "ClientSharedMemory"]


class ClientSharedMemory(ClientTransport):
    """Uses the memory that one server lends.

    Args:
        is_wanted: whether the server may lend memory.
    """

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._lent = LentMemory()
        self._next: Segment | None = None  # memory that the next push may fill at once
        self._opening: OutgoingPush | None = None
        self._lane: ClientMemoryLane | None = None

    def begin(self, opening: OutgoingPush) -> ClientLane | None:
        """See `ClientTransport`. After a successful push, its memory may be filled again before the admission."""
        ready, self._next = self._next, None
        self._opening, self._lane = opening, None
        if ready is not None and opening.has_fragments:
            self._lane = ClientMemoryLane(opening, ready, self._keep)
        return self._lane

    def announce(self, header: pb.PushHeader, opening: OutgoingPush, is_free: bool) -> None:  # noqa: ARG002
        """See `ClientTransport`."""
        header.accepts_shared_memory = self._is_wanted and opening.has_fragments

    def admitted(self, admission: pb.PushAdmission, is_free: bool) -> ClientLane | None:  # noqa: ARG002
        """See `ClientTransport`."""
        opening = self._opening
        if opening is None or not opening.has_fragments:
            return None
        loan = self._lent.accept(admission, opening.manifest)
        if loan is None:
            return None
        lane = ClientMemoryLane(opening, None, self._keep) if self._lane is None else self._lane
        lane.loan_offered = loan
        return lane

    def _keep(self, segment: Segment) -> None:
        self._next = segment


class ClientMemoryLane(ClientLane):
    """One push in lent memory.

    Args:
        opening: the push.
        ready: memory that may be filled before the admission.
        keep: called with the memory that the next push may fill.

    Attributes:
        loan_offered: the memory that the admission lends.
    """

    def __init__(self, opening: OutgoingPush, ready: Segment | None, keep: Callable[[Segment], None]) -> None:
        self.opening = opening
        self.loan_offered: Loan | None = None
        self._keep = keep
        self._ready = ready
        self._filled = 0
        self._is_used = False
        self._copying = Copying(opening.manifest, opening.raw_fragment)

    @property
    def loan(self) -> Loan | None:
        """See `ClientLane`."""
        return self.loan_offered if self._is_used else None

    def prepare(self) -> bool:
        """See `ClientLane`."""
        if self._ready is None or self._filled >= self.opening.manifest.fragment_count or self._copying.over:
            return False
        self._filled = self._copying.fill(self._ready, self._filled)
        return True

    def up(self, first: int) -> Iterator[bytes]:
        """See `ClientLane`."""
        assert self.loan_offered is not None
        contribution = self.loan_offered.contribution
        filled = self._filled if contribution is self._ready else first
        while first < self.opening.manifest.fragment_count:
            if filled <= first:
                filled = self._copying.fill(contribution, first)
            if self._copying.over:
                return
            put = pb.SharedFragments(first=first, count=filled - first)
            yield pb.PushAndAverageRequest(shared=put).SerializeToString()
            first = filled

    def down(self, message: pb.PushAndAverageResponse) -> tuple[int, int] | None:
        """See `ClientLane`."""
        if not message.HasField("shared") or self.loan_offered is None:
            return None
        self._is_used = True
        return message.shared.first, message.shared.count

    def end(self, ending: Ending) -> ModelAverageError | None:
        """See `ClientLane`. Waits for a copy in progress."""
        self._copying.end()
        if ending.is_done and self.loan_offered is not None:
            self._keep(self.loan_offered.contribution)
        return None
