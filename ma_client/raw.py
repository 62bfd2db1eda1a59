"""Arrays as the bytes that travel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, dtype_name

__all__ = ["bytes_of"]


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The raw little-endian bytes of an array; a view wherever its memory allows."""
    little = DTYPES[dtype_name(array.dtype)]
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data
