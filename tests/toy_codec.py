"""A toy codec: changes of float32 as 16 bits, in blocks with a common scale; an example of an added codec."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.base import Codec
from modelaverage.manifest import DTYPES, Manifest, Piece

__all__ = ["BLOCK", "LEAST", "ToyCodec"]

_Array = NDArray[np.generic]

BLOCK = 8
LEAST = 4
"""Pieces with fewer elements stay raw."""


class ToyCodec(Codec):
    """Blocks of 8 changes: a float32 scale, then an int16 for every element. Other pieces are raw."""

    @property
    def name(self) -> str:
        return "toy"

    def size_bytes(self, manifest: Manifest, index: int) -> int:
        return sum(self._size_bytes(manifest, piece) for piece in manifest.pieces[index])

    def encode(
        self, manifest: Manifest, index: int, values: Sequence[_Array], base: Sequence[_Array]
    ) -> Sequence[memoryview]:
        parts = list[memoryview]()
        for piece, ours, theirs in zip(manifest.pieces[index], values, base, strict=True):
            if not self._is_coded(manifest, piece):
                dtype = DTYPES[manifest.variables[piece.variable].dtype]
                parts.append(ours.astype(dtype, copy=False).view(np.uint8).data)
                continue
            changes = theirs.astype(np.float32) - ours.astype(np.float32)
            for start in range(0, piece.count, BLOCK):
                block = changes[start : start + BLOCK]
                scale = np.abs(block).max() / np.float32(32767) or np.float32(1)
                parts.append(memoryview(scale.astype("<f4").tobytes()))
                parts.append(memoryview(np.rint(block / scale).astype("<i2").tobytes()))
        return parts

    def decode(self, manifest: Manifest, index: int, data: memoryview, base: Sequence[_Array]) -> Sequence[_Array]:
        found = list[_Array]()
        for piece, theirs in zip(manifest.pieces[index], base, strict=True):
            coded, data = data[: self._size_bytes(manifest, piece)], data[self._size_bytes(manifest, piece) :]
            if not self._is_coded(manifest, piece):
                found.append(np.frombuffer(coded, DTYPES[manifest.variables[piece.variable].dtype]))
                continue
            values = theirs.astype(np.float32)
            for start in range(0, piece.count, BLOCK):
                count, at = min(BLOCK, piece.count - start), start // BLOCK * (4 + 2 * BLOCK)
                scale = np.frombuffer(coded, "<f4", 1, at)
                values[start : start + count] -= np.frombuffer(coded, "<i2", count, at + 4) * scale
            found.append(values)
        return found

    @staticmethod
    def _is_coded(manifest: Manifest, piece: Piece) -> bool:
        return manifest.variables[piece.variable].dtype == "float32" and piece.count >= LEAST

    def _size_bytes(self, manifest: Manifest, piece: Piece) -> int:
        if self._is_coded(manifest, piece):
            return -(-piece.count // BLOCK) * 4 + 2 * piece.count
        return piece.count * DTYPES[manifest.variables[piece.variable].dtype].itemsize
