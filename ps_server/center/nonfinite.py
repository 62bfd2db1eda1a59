"""Counts values that are not finite, at almost no cost while there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.outer.base import summed_in

__all__ = ["count_nonfinite"]

_Array = NDArray[np.generic]

_ROW = 1 << 13
"""Elements of a product of two vectors: for longer ones, the linear algebra library would start threads of its own."""


def count_nonfinite(values: _Array) -> int:
    """How many of the values, one-dimensional, are not finite."""
    # Finite values may overflow here, but almost always this takes one pass and no memory.
    with np.errstate(all="ignore"):
        if np.isfinite(_any_sum(values)):
            return 0
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _any_sum(values: _Array) -> Any:
    """A sum to which every value contributes: of squares, which takes half as long, if there are many."""
    if values.itemsize == 2 or values.size < _ROW or not values.flags.aligned:
        return np.add.reduce(values, dtype=summed_in(values.dtype))
    whole = values.size // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, _ROW), values[whole:]
    return np.matmul(rows[:, np.newaxis, :], rows[:, :, np.newaxis]).sum() + rest.dot(rest)
