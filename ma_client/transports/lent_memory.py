"""Memory that the server lends to this worker: maps it, keeps it, and fills it with fragments."""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np

from ma_client.transports.staging import FragmentSource, read_only
from ma_client.values.raw import LARGE_BYTES, bytes_of
from ma_client.values.same import SameArrays
from modelaverage.errors import Reason, RetryPushError
from modelaverage.manifest import Manifest
from modelaverage.runtime.shared_memory import Segment, SegmentAddress
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Copying", "LentMemory", "Loan"]

# The server is told after every chunk, so that it can sum while the next bytes are copied. Each report costs a message:
# with chunks of 8 MiB, a round of 40 MB took a third longer.
_CHUNK_BYTES = 32 << 20


class Copying:
    """Copies one push's fragments into lent memory; may be ended from another thread."""

    def __init__(self, manifest: Manifest, fragments: FragmentSource) -> None:
        self._manifest = manifest
        self._fragments = fragments
        self._chunk = max(1, _CHUNK_BYTES // manifest.fragment_size_bytes)
        self._lock = threading.Lock()
        self.over = False
        """Whether the push has ended: this worker may no longer write to the memory."""

    def fill(self, contribution: Segment, first: int) -> int:
        """Copies a chunk of fragments from ``first`` on, unless the push is over. Returns where it stopped."""
        room = contribution.body.data
        with self._lock:
            end = first if self.over else min(first + self._chunk, self._manifest.fragment_count)
            for index in range(first, end):
                at = self._manifest.fragment_bounds(index)[0]
                for part in self._fragments(index):
                    end_at = at + len(part)
                    if end_at - at < LARGE_BYTES:
                        room[at:end_at] = part
                    else:
                        np.copyto(contribution.body[at:end_at], np.frombuffer(part, np.uint8))
                    at = end_at
        return end

    def end(self) -> None:
        """The push is over; waits for a copy in progress."""
        with self._lock:
            self.over = True


class _Views:
    """The variables in a segment; made when they are first read, and then kept."""

    def __init__(self, manifest: Manifest, segment: Segment) -> None:
        self.manifest = manifest
        self._segment = segment

    @cached_property
    def arrays(self) -> SameArrays:
        """By name; read-only."""
        return SameArrays(read_only(self.manifest.arrays(self._segment.body)))


class Loan:
    """The memory for one push: one segment for the worker's contribution, another with the average."""

    def __init__(self, contribution: Segment, average: Segment, views: _Views) -> None:
        self.contribution = contribution
        self._average = average
        self._views = views
        self._generation = average.generation

    @property
    def arrays(self) -> SameArrays:
        """The average in the server's memory, by name; read-only views."""
        return self._views.arrays

    def intact_bytes(self) -> list[memoryview] | None:
        """Copies of the average's variables; None if the server has overwritten them."""
        values = [bytes_of(array.copy()) for array in self.arrays.values()]
        return values if self.is_intact else None

    @property
    def is_intact(self) -> bool:
        """Whether the server has not overwritten the average yet."""
        return self._average.generation == self._generation

    def check_intact(self) -> None:
        """Raises RetryPushError if the server has overwritten the average meanwhile."""
        if not self.is_intact:
            raise RetryPushError("a later round overtook this worker as it copied the average", Reason.ROUND_RESTARTED)


class LentMemory:
    """The segments that this worker has mapped. The server lends the same ones every round."""

    def __init__(self) -> None:
        self._segments: dict[SegmentAddress, Segment] = {}
        self._views: dict[SegmentAddress, _Views] = {}  # of the segments with averages

    def accept(self, admission: pb.PushAdmission, manifest: Manifest) -> Loan | None:
        """The memory that an admission offers; None if it offers none that this process can use."""
        if not admission.HasField("contribution"):
            return None
        contribution = self._find(admission.contribution, manifest, writable=True)
        average = self._find(admission.average, manifest, writable=False)
        if contribution is None or average is None:
            return None
        key = SegmentAddress(admission.average.path, admission.average.nonce)
        views = self._views.get(key)
        if views is None or views.manifest is not manifest:
            views = _Views(manifest, average)
        self._views = {address: self._views[address] for address in self._views if address in self._segments}
        self._views[key] = views
        return Loan(contribution, average, views)

    def _find(self, offer: pb.SharedMemory, manifest: Manifest, writable: bool) -> Segment | None:
        address = SegmentAddress(offer.path, offer.nonce)
        segment = self._segments.get(address)
        if segment is None:
            segment = Segment.open(address, manifest.buffer_size_bytes, writable)
            if segment is not None:
                # One contribution and two averages are in use; older segments belong to an earlier server process.
                self._segments = dict([*self._segments.items(), (address, segment)][-4:])
        return segment
