"""Memory for a center that arrives in messages. Used only once it is complete and confirmed by the server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.errors import ProtocolError
from modelaverage.manifest import Manifest

__all__ = ["FragmentSource", "Memory", "Staging", "read_only"]

FragmentSource = Callable[[int], Iterable[memoryview]]
"""Returns the bytes of a fragment to be sent, by its index, as parts to be joined."""


class Memory:
    """Memory for the centers of all shards, in sequence; allocated when the first fragment arrives.

    May be used from any thread.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._bytes: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()  # two shards' first fragments may arrive at the same time

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The whole memory; uint8."""
        with self._lock:
            if self._bytes is None:
                self._bytes = np.zeros(self._size_bytes, np.uint8)
            return self._bytes

    def overlaps(self, array: NDArray[Any]) -> bool:
        """Whether an array may lie in it."""
        return self._bytes is not None and np.may_share_memory(array, self._bytes)

    def release(self) -> None:
        """Frees the memory until a center arrives in messages again."""
        with self._lock:
            self._bytes = None


class Staging:
    """Memory for one shard's center, reused in every round.

    Args:
        manifest: the manifest of the shard.
        memory: contains this staging.
        start: offset of its first byte there, a multiple of 8.

    Attributes:
        is_torn: whether an incomplete center has overwritten the previous one.
    """

    def __init__(self, manifest: Manifest, memory: Memory, start: int = 0) -> None:
        self.manifest = manifest
        self._memory = memory
        self._start, self._end = start, start + manifest.buffer_size_bytes
        self.is_torn = False
        self._has_come = False
        self._received = 0
        self._old: NDArray[np.uint8] | None = None  # the bytes that the arriving center has replaced, from the first on
        self._old_end = 0

    @property
    def is_whole(self) -> bool:
        """Whether a complete center is here."""
        return self._has_come and not self.is_torn

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The variables in it, by name; read-only views."""
        return read_only(self.manifest.arrays(self.flat))

    @property
    def flat(self) -> NDArray[np.uint8]:
        """The flat buffer; uint8."""
        return self._memory.bytes[self._start : self._end]

    def begin(self, keeps_old: bool = False) -> None:
        """A new center begins to arrive.

        Args:
            keeps_old: keep what it replaces, so that `roll_back` can restore the old center.
        """
        self._received = 0
        self._old_end = 0
        if not keeps_old:
            self._old = None
        elif self._old is None:
            self._old = np.empty(self._end - self._start, np.uint8)

    def roll_back(self) -> None:
        """The center does not arrive completely: restores the old one if it was kept."""
        if self._old is not None and self.is_torn:
            self.flat[: self._old_end] = self._old[: self._old_end]
            self._old_end, self.is_torn = 0, False

    @property
    def received(self) -> int:
        """How many of its fragments have arrived."""
        return self._received

    def go_on(self, first: int) -> None:
        """Resumes a center whose fragments before ``first`` are here."""
        self._received = min(first, self._received)

    def receive(self, index: int, data: memoryview) -> None:
        """Stores the next fragment, or a run of fragments. Raises ProtocolError if the index or the size is
        wrong."""
        if index != self._received or index >= self.manifest.fragment_count:
            raise ProtocolError(f"the server sent fragment {index} where {self._received} belongs")
        count = self.count(index, data)
        self.put(index, data)
        self._received = index + count

    def count(self, index: int, data: memoryview, codec: Codec = RAW) -> int:
        """How many whole fragments, from this one on, these bytes hold. Raises ProtocolError otherwise."""
        end = codec.run_end(self.manifest, index, len(data)) if index < self.manifest.fragment_count else None
        if end is None:
            where = "the model has no such fragment"
            if index < self.manifest.fragment_count:
                where = f"which has {codec.size_bytes(self.manifest, index)}"
            raise ProtocolError(f"the server sent {len(data)} bytes for fragment {index}, {where}")
        return end - index

    def put(self, index: int, data: memoryview, codec: Codec = RAW) -> None:
        """Writes whole fragments to their place, the next ones in order. The old center is the codec's base."""
        flat = self.flat
        if self._old is not None:
            end = self.manifest.fragment_bounds(index + self.count(index, data, codec) - 1)[1]
            self._old[self._old_end : end] = flat[self._old_end : end]
            self._old_end = max(end, self._old_end)
        self.is_torn = True
        if codec is RAW:
            RAW.decode_run(self.manifest, flat, index, data)
            return
        for each, part in codec.split_run(self.manifest, index, data):
            codec.decode_into(self.manifest, flat, each, part, flat)

    def room(self) -> memoryview:
        """Memory for the whole next center. Call `begin_to_fill` before writing, and `is_filled` after."""
        return self.flat.data

    def begin_to_fill(self) -> None:
        """Marks the previous center as overwritten."""
        self.is_torn = True

    def is_filled(self) -> None:
        """Marks the center as complete, here or in the memory that replaces this one."""
        self._received = self.manifest.fragment_count
        self.is_torn = False
        self._has_come = True

    @property
    def is_complete(self) -> bool:
        """Whether every fragment has arrived."""
        return self._received == self.manifest.fragment_count

    def check_complete(self) -> None:
        """Raises ProtocolError unless every fragment has arrived."""
        if not self.is_complete:
            raise ProtocolError(f"the server sent {self._received} of {self.manifest.fragment_count} fragments")
        self.is_filled()


def read_only(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The same arrays, which can no longer be written to."""
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
