"""Arrays as bytes for the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, dtype_name

__all__ = ["LARGE_BYTES", "bytes_of", "same_bytes"]

LARGE_BYTES = 1 << 16
"""From this size on, numpy copies: it lets other threads run meanwhile, but takes longer for a small array than an
assignment of memoryviews."""

# Larger arrays are compared in pieces of this size, so that the first difference ends the comparison.
_PIECE_BYTES = 1 << 16


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The raw little-endian bytes of an array; a view where its memory allows."""
    little = DTYPES[dtype_name(array.dtype)]
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data


def same_bytes(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Whether two arrays have the same type, size and bytes: a NaN is equal to itself, and 0.0 is not -0.0."""
    if first.dtype != second.dtype or first.nbytes != second.nbytes:
        return False
    if first.nbytes <= _PIECE_BYTES:
        return first.tobytes() == second.tobytes()
    bits = f"u{first.itemsize}"
    ours, theirs = (np.ascontiguousarray(array).reshape(-1).view(bits) for array in (first, second))
    piece = _PIECE_BYTES // first.itemsize
    return all((ours[at : at + piece] == theirs[at : at + piece]).all() for at in range(0, len(ours), piece))
