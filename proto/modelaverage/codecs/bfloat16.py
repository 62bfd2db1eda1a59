"""The codec `bfloat16`: each change of a float32 variable in 16 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.changes import HUGE, LARGEST, STEP_ELEMENTS, Changes, finite_or_zero, nan_like, steps, widened
from modelaverage.manifest import DTYPES

__all__ = ["BFLOAT16", "Bfloat16"]

_BFLOAT16 = DTYPES["bfloat16"]
_HUGE = np.float32(HUGE["float32"])
_LARGEST = np.float32(LARGEST["float32"])
_LARGEST_CHANGE = np.float32(LARGEST["bfloat16"])

_Array = NDArray[np.generic]
_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]


class Bfloat16(Changes):
    """Each change rounded to the nearest bfloat16 (ties to even): its error is at most 2^-8 of the change.

    The base counts as 0 where it is not finite. A finite value has a finite change, clipped to the largest bfloat16,
    and is decoded to a finite value, clipped to the largest float32.
    """

    dtypes = ("float32",)

    @property
    def name(self) -> str:
        """``bfloat16``."""
        return "bfloat16"

    def coded_size_bytes(self, count: int) -> int:
        """Two bytes for each element."""
        return 2 * count

    def encode_piece(self, dtype: str, values: _Array, base: _Array, coded: _Bytes) -> None:  # noqa: ARG002
        """Differences, rounded; with care where one is huge or not finite."""
        codes = coded.view(_BFLOAT16)
        scratch = np.empty(min(STEP_ELEMENTS, len(values)), np.float32)
        for part in steps(len(values)):
            ours, theirs = widened(values[part]), widened(base[part])
            change = np.subtract(theirs, ours, out=scratch[: len(ours)])
            if not (change.max() < _HUGE and change.min() > -_HUGE):
                change = _change(ours, theirs)
            np.copyto(codes[part], change, casting="unsafe")

    def decode_piece(self, dtype: str, coded: _Bytes, base: _Array, values: _Array) -> None:  # noqa: ARG002
        """Differences; with care where one may not be finite."""
        codes = coded.view(_BFLOAT16)
        scratch = np.empty((2, min(STEP_ELEMENTS, len(values))), np.float32)
        for part in steps(len(values)):
            theirs = widened(base[part])
            change, found = scratch[:, : len(theirs)]
            np.copyto(change, codes[part], casting="unsafe")
            np.subtract(theirs, change, out=found)
            # Finite sums have finite terms. Other sums may have, too; then both ways give the same.
            values[part] = found if np.isfinite(found.sum()) else _value(change, theirs)


def _change(values: _Floats, base: _Floats) -> _Floats:
    """The change to encode, for any floats."""
    change = finite_or_zero(base) - values
    change = np.where(np.isfinite(values), np.clip(change, -_LARGEST_CHANGE, _LARGEST_CHANGE), change)
    return np.where(np.isnan(values), np.float32(np.nan), change)


def _value(change: _Floats, base: _Floats) -> _Floats:
    """The decoded value, for any floats."""
    value = finite_or_zero(base) - change
    value = np.where(np.isfinite(change), np.clip(value, -_LARGEST, _LARGEST), value)
    return np.where(np.isnan(change), nan_like(base), value)


BFLOAT16 = Bfloat16()
"""The codec `bfloat16`."""
