"""Where a center arrives inline. It is handed on only when it is whole and the server has said that it counts."""

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
"""The bytes of a fragment that goes up, by its index, as parts to be joined."""


class Memory:
    """Bytes for the centers of all shards, one behind the other; made when the first fragment arrives.

    For any thread.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._bytes: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()  # two shards' first fragments may arrive at the same time

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """All of it; uint8."""
        with self._lock:
            if self._bytes is None:
                self._bytes = np.zeros(self._size_bytes, np.uint8)
            return self._bytes

    def overlaps(self, array: NDArray[Any]) -> bool:
        """Whether an array may lie in it."""
        return self._bytes is not None and np.may_share_memory(array, self._bytes)

    def release(self) -> None:
        """Gives it back until a center arrives inline again."""
        with self._lock:
            self._bytes = None


class Staging:
    """Room for one shard's center, used again for every round.

    Args:
        manifest: of the shard.
        memory: where the room is.
        start: its first byte there, a multiple of 8.

    Attributes:
        is_torn: whether a center has begun to arrive here, over the one before, and never came whole.
    """

    def __init__(self, manifest: Manifest, memory: Memory, start: int = 0) -> None:
        self.manifest = manifest
        self._memory = memory
        self._start, self._end = start, start + manifest.buffer_size_bytes
        self.is_torn = False
        self._has_come = False
        self._received = 0

    @property
    def is_whole(self) -> bool:
        """Whether a center has come, and nothing over it."""
        return self._has_come and not self.is_torn

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The variables in it, by name; views that cannot be written to."""
        return read_only(self.manifest.arrays(self._memory.bytes[self._start : self._end]))

    def begin(self) -> None:
        """A new center begins to arrive."""
        self._received = 0

    @property
    def received(self) -> int:
        """How many fragments of it have come."""
        return self._received

    def go_on(self, first: int) -> None:
        """The fragments from ``first`` on are still to come, of a center whose others are here."""
        self._received = min(first, self._received)

    def receive(self, index: int, data: memoryview) -> None:
        """The next fragment has come, or a run of them. Raises ProtocolError if it is another one, or has another
        size."""
        if index != self._received or index >= self.manifest.fragment_count:
            raise ProtocolError(f"the server sent fragment {index} where {self._received} belongs")
        count = self.count(index, data)
        self.put(index, data)
        self._received = index + count

    def count(self, index: int, data: memoryview, codec: Codec = RAW) -> int:
        """How many fragments, from this one on, these bytes are. Raises ProtocolError if they are no whole ones."""
        end = codec.run_end(self.manifest, index, len(data)) if index < self.manifest.fragment_count else None
        if end is None:
            where = "the model has no such fragment"
            if index < self.manifest.fragment_count:
                where = f"which has {codec.size_bytes(self.manifest, index)}"
            raise ProtocolError(f"the server sent {len(data)} bytes for fragment {index}, {where}")
        return end - index

    def put(self, index: int, data: memoryview, codec: Codec = RAW) -> None:
        """Writes fragments that are whole to where they belong."""
        self.is_torn = True
        codec.decode_run(self.manifest, self._memory.bytes[self._start : self._end], index, data)

    def room(self) -> memoryview:
        """Where all of the next center may be written; `begin_to_fill` when that begins, `filled` when it is done."""
        return self._memory.bytes[self._start : self._end].data

    def begin_to_fill(self) -> None:
        """What was in the room is no longer whole."""
        self.is_torn = True

    def is_filled(self) -> None:
        """All of the center has come, here or to where it is used instead."""
        self._received = self.manifest.fragment_count
        self.is_torn = False
        self._has_come = True

    @property
    def is_complete(self) -> bool:
        """Whether every fragment has come."""
        return self._received == self.manifest.fragment_count

    def check_complete(self) -> None:
        """Raises ProtocolError unless every fragment has come."""
        if not self.is_complete:
            raise ProtocolError(f"the server sent {self._received} of {self.manifest.fragment_count} fragments")
        self.is_filled()


def read_only(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The same arrays, which can no longer be written to."""
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
