"""What int8 and int4 share: blocks of 128 changes, each with a float32 scale, as small integers.

The layout and the arithmetic are described for authors of clients in docs/protocol.md ("Codecs").
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.changes import HUGE, LARGEST, STEP_ELEMENTS, Changes, finite_or_zero, nan_like, steps, widened

__all__ = ["BLOCK", "Blocks"]

BLOCK = 128
"""Elements that share a scale."""

_SCALE_BYTES = 4
_LEAST_SCALE = np.float32(2.0**-126)  # The least normal float32.
_STARTS = np.arange(0, STEP_ELEMENTS, BLOCK)
_LARGEST_CHANGE = np.float32(LARGEST["float32"])

_Array = NDArray[np.generic]
_Floats = NDArray[np.float32]
_Codes = NDArray[np.int8]
_Bytes = NDArray[np.uint8]


class Blocks(Changes):
    """A coded piece: the scales of all blocks, then the codes of all blocks.

    The piece is cut into blocks of 128 elements; the last one is filled up with changes of zero. In an ordinary block
    the scale is the largest magnitude divided by ``levels``, a code is the change divided by the scale, rounded to the
    nearest integer (ties to even), and decodes to code * scale. A scale that would not be a normal number is 0.

    A block whose largest magnitude is not finite, or huge, is *special*: its scale has the sign bit set. In it the base
    counts as 0 where it is not finite, the code ``-levels - 1`` means NaN, ``levels`` infinity, ``-levels`` minus
    infinity, and the codes between them finite values, as in an ordinary block.

    Attributes:
        levels: the largest code.
        block_bytes: the size of a block's codes.
    """

    dtypes = ("float32", "bfloat16", "float16")
    levels: int
    block_bytes: int

    @abstractmethod
    def pack(self, codes: _Codes, packed: _Bytes) -> None:
        """Writes codes, shape (n, 128), to bytes, shape (n, ``block_bytes``)."""

    @abstractmethod
    def unpack(self, packed: _Bytes, codes: _Codes) -> None:
        """The reverse of `pack`."""

    def coded_size_bytes(self, count: int) -> int:
        """The scales and codes of whole blocks."""
        return _blocks(count) * (_SCALE_BYTES + self.block_bytes)

    def encode_piece(self, dtype: str, values: _Array, base: _Array, coded: _Bytes) -> None:
        """Scales and codes, step by step; special blocks are found by their largest magnitude."""
        scales, packed = self._parts(coded, len(values))
        scratch = _Scratch(len(values))
        for part in steps(len(values)):
            ours, theirs = widened(values[part]), widened(base[part])
            blocks = slice(part.start // BLOCK, _blocks(part.stop))
            changes, work, codes = scratch.of(blocks.stop - blocks.start)
            changes.reshape(-1)[len(ours) :] = 0
            np.subtract(theirs, ours, out=changes.reshape(-1)[: len(ours)])
            # As integers, the bits of magnitudes are in the order of the magnitudes, and NaN is above infinity.
            np.abs(changes, out=work)
            flat = work.view(np.int32).reshape(-1)
            largest = np.maximum.reduceat(flat, _STARTS[: len(work)]).view(np.float32)  # faster than max(axis=1)
            scale, divisor = _scale_and_divisor(largest, self.levels)
            np.divide(changes, divisor, out=changes)
            np.rint(changes, out=changes)
            np.copyto(codes, changes, casting="unsafe")
            special = np.flatnonzero(~(largest < np.float32(HUGE[dtype])))
            if len(special):
                rows = _rows(ours, special), _rows(theirs, special)
                scale[special], codes[special] = self._encode_special(*rows)
            scales[blocks] = scale
            self.pack(codes, packed[blocks])

    def decode_piece(self, dtype: str, coded: _Bytes, base: _Array, values: _Array) -> None:
        """The reverse; special blocks are found by the sign of their scale."""
        scales, packed = self._parts(coded, len(values))
        scratch = _Scratch(len(values))
        for part in steps(len(values)):
            theirs = widened(base[part])
            blocks = slice(part.start // BLOCK, _blocks(part.stop))
            changes, _, codes = scratch.of(blocks.stop - blocks.start)
            scale = scales[blocks].astype(np.float32)
            self.unpack(packed[blocks], codes)
            np.copyto(changes, codes)
            np.multiply(changes, scale[:, None], out=changes)
            found = changes.reshape(-1)[: len(theirs)]
            np.subtract(theirs, found, out=found)
            special = np.flatnonzero(np.signbit(scale))
            if len(special):
                rows = _rows(theirs, special)
                changes[special] = self._decode_special(codes[special], scale[special], rows, LARGEST[dtype])
            values[part] = found

    def _parts(self, coded: _Bytes, count: int) -> tuple[NDArray[np.float32], _Bytes]:
        """The scales, shape (blocks,), and the packed codes, shape (blocks, ``block_bytes``); views."""
        blocks = _blocks(count)
        scales = coded[: blocks * _SCALE_BYTES].view("<f4")
        return scales, coded[blocks * _SCALE_BYTES :].reshape(blocks, self.block_bytes)

    def _encode_special(self, values: _Floats, base: _Floats) -> tuple[_Floats, _Floats]:
        """Scales, shape (n,), and codes, shape (n, 128), of special blocks."""
        finite = np.isfinite(values)
        change = np.clip(finite_or_zero(base) - values, -_LARGEST_CHANGE, _LARGEST_CHANGE)
        change = np.where(finite, change, np.float32(0))
        scale, divisor = _scale_and_divisor(np.abs(change).max(axis=1), self.levels - 1)
        code = np.rint(change / divisor)
        code = np.where(finite, code, np.copysign(np.float32(self.levels), values))
        return -scale, np.where(np.isnan(values), np.float32(-self.levels - 1), code)

    def _decode_special(self, codes: _Codes, scale: _Floats, base: _Floats, largest: float) -> _Floats:
        """Values of special blocks, shape (n, 128). The finite ones stay finite in the variable's dtype."""
        change = codes * np.abs(scale)[:, None]  # Finite for what an encoder wrote: 126 * (largest / 126) is.
        values = np.clip(finite_or_zero(base) - change, -np.float32(largest), np.float32(largest))
        values = np.where(np.abs(codes) == self.levels, np.copysign(np.float32(np.inf), codes), values)
        return np.where(codes == -self.levels - 1, nan_like(base), values)


class _Scratch:
    """Temporary arrays of one call."""

    def __init__(self, count: int) -> None:
        blocks = _blocks(min(STEP_ELEMENTS, count))
        self._floats = np.empty((2, blocks, BLOCK), np.float32)
        self._codes = np.empty((blocks, BLOCK), np.int8)

    def of(self, blocks: int) -> tuple[_Floats, _Floats, _Codes]:
        """Two arrays of floats and one of codes, shape (blocks, 128)."""
        return self._floats[0, :blocks], self._floats[1, :blocks], self._codes[:blocks]


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _scale_and_divisor(largest: _Floats, levels: int) -> tuple[_Floats, _Floats]:
    """The scale of each block, and what to divide its changes by: infinity if the scale is 0."""
    scale = largest / np.float32(levels)
    scale[scale < _LEAST_SCALE] = 0
    return scale, np.where(scale == 0, np.float32(np.inf), scale)[:, None]


def _rows(elements: _Floats, blocks: NDArray[np.intp]) -> _Floats:
    """Some blocks of a step, shape (n, 128)."""
    rows = np.zeros((_blocks(len(elements)), BLOCK), np.float32)
    rows.reshape(-1)[: len(elements)] = elements
    return rows[blocks]
