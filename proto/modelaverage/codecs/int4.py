"""The codec `int4`: blocks of 128 changes as a scale and four bits for each; 13 % of float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.blocks import BLOCK, Blocks

__all__ = ["INT4", "Int4"]

_HALF = BLOCK // 2


class Int4(Blocks):
    """Changes in 15 levels of their block's largest. An element's error is at most half a scale, plus rounding."""

    levels = 7
    block_bytes = _HALF

    @property
    def name(self) -> str:
        """``int4``."""
        return "int4"

    def pack(self, codes: NDArray[np.int8], packed: NDArray[np.uint8]) -> None:
        """Byte i: element i in the low four bits, element i + 64 in the high ones, both in two's complement."""
        bits = codes.view(np.uint8)
        np.left_shift(bits[:, _HALF:], 4, out=packed)
        np.bitwise_or(packed, bits[:, :_HALF] & np.uint8(15), out=packed)

    def unpack(self, packed: NDArray[np.uint8], codes: NDArray[np.int8]) -> None:
        """Shifts to the right extend the sign."""
        bytes_ = packed.view(np.int8)
        low, high = codes[:, :_HALF], codes[:, _HALF:]
        np.left_shift(bytes_, 4, out=low)
        np.right_shift(low, 4, out=low)
        np.right_shift(bytes_, 4, out=high)


INT4 = Int4()
"""The codec `int4`."""
