"""Where a center arrives inline. It is handed on only when it is whole and the server has said that it counts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import ProtocolError
from modelaverage.manifest import Manifest

__all__ = ["Staging", "read_only"]


class Staging:
    """A flat buffer for one center, used again for every round; made when the first fragment arrives."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._received = 0

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.zeros(self.manifest.buffer_size_bytes, np.uint8)

    @cached_property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The variables in it, by name; views that cannot be written to."""
        return read_only(self.manifest.arrays(self._bytes))

    def overlaps(self, array: NDArray[Any]) -> bool:
        """Whether an array may lie in this buffer."""
        return "_bytes" in self.__dict__ and np.may_share_memory(array, self._bytes)

    def release(self) -> None:
        """Gives the memory back until a center arrives inline again."""
        self.__dict__.pop("arrays", None)
        self.__dict__.pop("_bytes", None)

    def begin(self) -> None:
        """A new center begins to arrive."""
        self._received = 0

    def receive(self, index: int, data: memoryview) -> None:
        """The next fragment has come. Raises ProtocolError if it is another one, or has another size."""
        if index != self._received or index >= self.manifest.fragment_count:
            raise ProtocolError(f"the server sent fragment {index} where {self._received} belongs")
        start, end = self.manifest.fragment_bounds(index)
        if len(data) != end - start:
            raise ProtocolError(f"the server sent {len(data)} bytes for fragment {index}, which has {end - start}")
        self._bytes[start:end] = np.frombuffer(data, np.uint8)
        self._received += 1

    def receive_elsewhere(self, first: int, count: int) -> None:
        """The next ``count`` fragments lie in shared memory. Raises ProtocolError if others come next."""
        if first != self._received or not 0 < count <= self.manifest.fragment_count - first:
            raise ProtocolError(f"the server sent {count} fragments from {first} on where {self._received} belongs")
        self._received += count

    def check_complete(self) -> None:
        """Raises ProtocolError unless every fragment has come."""
        if self._received < self.manifest.fragment_count:
            raise ProtocolError(f"the server sent {self._received} of {self.manifest.fragment_count} fragments")


def read_only(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The same arrays, which can no longer be written to."""
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
