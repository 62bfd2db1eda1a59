"""Memory for copies that are handed out, used again once nobody has the copy any more.

Fresh memory of some size comes from the kernel page by page, zeroed; for an array of 40 MB that takes longer than the
copy into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_client.values.raw import LARGE_BYTES

__all__ = ["ReusedMemory"]


class ReusedMemory:
    """Makes copies of arrays. May be used from any thread.

    The memory of a large copy comes back when the copy and all views of it are gone. As much of it is kept as the
    copies of one call need.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}  # by size
        self._wanted: Counter[int] = Counter()  # how many of each size one call needs

    def copies(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Copies of arrays, by name; writable, and the caller's own."""
        self._wanted = Counter(array.nbytes for array in arrays.values() if array.nbytes >= LARGE_BYTES)
        for size_bytes in self._free.keys() - self._wanted.keys():
            self._free.pop(size_bytes, None)
        return {name: self._copy(array) for name, array in arrays.items()}

    def forget(self) -> None:
        """Frees the memory that nobody has, and does not keep what comes back."""
        self._wanted = Counter()
        self._free.clear()

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        """Nobody has this memory any more."""
        free = self._free.setdefault(memory.nbytes, [])
        if len(free) < self._wanted[memory.nbytes]:
            free.append(memory)

    def _copy(self, array: NDArray[Any]) -> NDArray[Any]:
        if array.nbytes < LARGE_BYTES:
            small: NDArray[Any] = array.copy()
            return small
        try:
            memory = self._free.get(array.nbytes, []).pop()
        except IndexError:
            memory = np.empty(array.nbytes, np.uint8)
        leased: NDArray[np.uint8] = np.asarray(_Lease(memory, self))
        copy = leased.view(array.dtype).reshape(array.shape)
        np.copyto(copy, array)
        return copy


class _Lease:
    """Memory for one copy; arrays keep it alive, and with it goes the last of them."""

    __slots__ = ("__array_interface__", "_memory", "_owner")

    def __init__(self, memory: NDArray[np.uint8], owner: ReusedMemory) -> None:
        self._memory = memory
        self._owner = owner
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self) -> None:
        self._owner.give_back(self._memory)
