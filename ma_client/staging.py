"""Where a center arrives. It is handed on only when it is whole and the server has said that it counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import ProtocolError
from modelaverage.manifest import Manifest

__all__ = ["Staging"]


class Staging:
    """A flat buffer for one center, used again for every round.

    Attributes:
        arrays: the variables in it, by name; views.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._bytes: NDArray[np.uint8] = np.zeros(manifest.buffer_size_bytes, np.uint8)
        self._received = 0
        self.arrays = manifest.arrays(self._bytes)

    def overlaps(self, array: NDArray[np.generic]) -> bool:
        """Whether an array may lie in this buffer."""
        return np.may_share_memory(array, self._bytes)

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

    def receive_shared(self, first: int, count: int, body: NDArray[np.uint8]) -> None:
        """The next ``count`` fragments lie in ``body``. Raises ProtocolError if others come next."""
        if first != self._received or first + count > self.manifest.fragment_count or count == 0:
            raise ProtocolError(f"the server sent {count} fragments from {first} on where {self._received} belongs")
        start, end = self.manifest.fragment_bounds(first)[0], self.manifest.fragment_bounds(first + count - 1)[1]
        np.copyto(self._bytes[start:end], body[start:end])
        self._received += count

    def check_complete(self) -> None:
        """Raises ProtocolError unless every fragment has come."""
        if self._received < self.manifest.fragment_count:
            raise ProtocolError(f"the server sent {self._received} of {self.manifest.fragment_count} fragments")
