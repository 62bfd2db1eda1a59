"""Arrays that are given again in every round, and what is made of them once.

A model of 16,000 tensors has 16,000 names, views and slices; making them takes many times as long as copying the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, overload

from numpy.typing import NDArray

from ma_client.values.raw import bytes_of
from modelaverage.manifest import DTYPES, Manifest, dtype_name

__all__ = ["PushedBytes", "SameArrays", "plain"]


class SameArrays(dict[str, NDArray[Any]]):
    """A dictionary of arrays that cannot be changed: always the same arrays, though their values may change.

    Attributes:
        prepared: what a reader has made of them; it belongs to one reader.
    """

    prepared: object | None = None

    @cached_property
    def bytes(self) -> tuple[memoryview, ...] | None:
        """The memory of each array, in order; None if the raw bytes of one of them are elsewhere."""
        if not all(array.flags.c_contiguous and _is_little(array) for array in self.values()):
            return None
        return tuple(bytes_of(array) for array in self.values())

    def fits(self, other: Mapping[str, NDArray[Any]]) -> bool:
        """Whether another dictionary has the same names in the same order, with arrays of these types and shapes."""
        return list(self) == list(other) and all(
            ours.dtype == theirs.dtype and ours.shape == theirs.shape
            for ours, theirs in zip(self.values(), other.values(), strict=True)
        )

    def __reduce__(self) -> tuple[type, tuple[dict[str, NDArray[Any]]]]:
        # A copy is a dictionary like any other.
        return dict, (dict(self),)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("these arrays belong to a session, which gives them again; copy the dictionary: dict(center)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class PushedBytes(Sequence[memoryview]):
    """The bytes of variables to be pushed, and how they are cut into fragments.

    Args:
        values: of each variable, in manifest order.
    """

    def __init__(self, values: Sequence[memoryview]) -> None:
        self._values = values
        self._manifest: Manifest | None = None
        self._parts: dict[int, Sequence[memoryview]] = {}

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        return self._values[index]

    def fragment_parts(self, manifest: Manifest, index: int) -> Sequence[memoryview]:
        """As `Manifest.fragment_parts`; they are made once."""
        if manifest is not self._manifest:
            self._manifest, self._parts = manifest, {}
        parts = self._parts.get(index)
        if parts is None:
            parts = self._parts[index] = manifest.fragment_parts(index, self._values)
        return parts


def plain(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """For users: a dictionary of their own instead of `SameArrays`, which JAX does not take for a tree."""
    return dict(arrays) if isinstance(arrays, SameArrays) else arrays


def _is_little(array: NDArray[Any]) -> bool:
    return array.dtype == DTYPES.get(dtype_name(array.dtype))
