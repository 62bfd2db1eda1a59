"""The codec `int4`: blocks of 128 changes as a scale and four bits for each; 13 % of float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.blocks import BLOCK, Blocks

__all__ = ["INT4", "Int4"]

_HALF = BLOCK // 2
# Eight codes are handled at once, as a word.
_HALF_WORDS = _HALF // 8
_BITS = np.uint64(4)
_LOW_BITS = np.uint64(0x0F0F0F0F0F0F0F0F)
_SIGN_BITS = np.uint64(0x8888888888888888)


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
        words = codes.view(np.uint64) & _LOW_BITS
        joined = words[:, _HALF_WORDS:] << _BITS
        joined |= words[:, :_HALF_WORDS]
        packed[...] = joined.view(np.uint8)

    def unpack(self, packed: NDArray[np.uint8], codes: NDArray[np.int8]) -> None:
        """Four bits n stand for (n ^ 8) - 8."""
        words = packed.copy().view(np.uint64)  # a copy is aligned
        words ^= _SIGN_BITS
        halves = codes.view(np.uint64)
        np.bitwise_and(words, _LOW_BITS, out=halves[:, :_HALF_WORDS])
        words >>= _BITS
        np.bitwise_and(words, _LOW_BITS, out=halves[:, _HALF_WORDS:])
        codes -= 8


INT4 = Int4()
"""The codec `int4`."""
