"""The codec `int8`: blocks of 128 changes as a scale and a byte for each; 26 % of float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.blocks import BLOCK, Blocks

__all__ = ["INT8", "Int8"]


class Int8(Blocks):
    """Changes in 255 levels of their block's largest. An element's error is at most half a scale, plus rounding."""

    levels = 127
    block_bytes = BLOCK

    @property
    def name(self) -> str:
        """``int8``."""
        return "int8"

    def pack(self, codes: NDArray[np.int8], packed: NDArray[np.uint8]) -> None:
        """Codes are bytes."""
        packed.view(np.int8)[...] = codes

    def unpack(self, packed: NDArray[np.uint8], codes: NDArray[np.int8]) -> None:
        """Codes are bytes."""
        codes[...] = packed.view(np.int8)


INT8 = Int8()
"""The codec `int8`."""
