"""What the lossy codecs share: which variables are coded, and the order of pieces in a fragment.

A piece is coded or raw. What is coded is the change, ``base - value`` in float32; the decoded value is ``base`` less
the decoded change. So a change of zero gives the base bit for bit: x - 0.0 is x, for x = -0.0 too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.base import Codec
from modelaverage.manifest import DTYPES, Manifest, Piece

__all__ = [
    "Changes",
    "HUGE",
    "LARGEST",
    "LEAST_ELEMENTS",
    "STEP_ELEMENTS",
    "finite_or_zero",
    "nan_like",
    "steps",
    "widened",
]

LEAST_ELEMENTS = 1024
"""Variables of fewer elements are raw: biases and norms are sensitive, and coding them would save little."""

LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
"""The largest finite value of each dtype that can be coded."""

HUGE = {"float32": 2.0**100, "bfloat16": 2.0**100, "float16": 2.0**7}
"""A change of this magnitude is treated with care: rounded, it might turn a finite value into an infinite one."""

STEP_ELEMENTS = 1 << 16
"""Elements that are coded at once: the temporary arrays fit into the cache of a core."""

_Array = NDArray[np.generic]
_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]


class Changes(Codec):
    """A codec of changes. Its file defines the encoding of one piece; this class does the rest.

    The pieces of a fragment follow each other without padding. A piece is coded if its variable has one of ``dtypes``
    and at least 1,024 elements, and if its coded size is less than its raw size; otherwise it is raw, little-endian.
    The size of a variable is that in the manifest: with several servers, the size of the shard's part.

    Attributes:
        dtypes: the dtypes that are coded.
    """

    dtypes: tuple[str, ...]

    @abstractmethod
    def coded_size_bytes(self, count: int) -> int:
        """The size of a coded piece of ``count`` elements."""

    @abstractmethod
    def encode_piece(self, dtype: str, values: _Array, base: _Array, coded: _Bytes) -> None:
        """Encodes one piece.

        Args:
            dtype: the variable's dtype.
            values: one-dimensional, of this dtype or float32.
            base: as many elements of this dtype.
            coded: where to write (`coded_size_bytes`).
        """

    @abstractmethod
    def decode_piece(self, dtype: str, coded: _Bytes, base: _Array, values: _Array) -> None:
        """Decodes one piece. Any bytes give some values.

        Args:
            dtype: the variable's dtype.
            coded: the coded piece, at any alignment.
            base: one-dimensional, of this dtype.
            values: where to write; as many elements of this dtype or float32. It may be ``base``.
        """

    def size_bytes(self, manifest: Manifest, index: int) -> int:
        """The sum of its pieces."""
        return sum(self._size_bytes(manifest, piece) for piece in manifest.pieces[index])

    def max_size_bytes(self, manifest: Manifest) -> int:
        """No piece is larger than raw."""
        return manifest.fragment_size_bytes

    def encode(
        self, manifest: Manifest, index: int, values: Sequence[_Array], base: Sequence[_Array]
    ) -> Sequence[memoryview]:
        """One part for each piece. Raw ones are views of ``values``, unless they had to be rounded."""
        parts = list[memoryview]()
        with np.errstate(all="ignore"):
            for piece, ours, theirs in zip(manifest.pieces[index], values, base, strict=True):
                dtype = manifest.variables[piece.variable].dtype
                if self._is_coded(manifest, piece):
                    coded = np.empty(self.coded_size_bytes(piece.count), np.uint8)
                    self.encode_piece(dtype, ours, theirs, coded)
                    parts.append(coded.data)
                else:
                    raw = np.ascontiguousarray(ours.astype(DTYPES[dtype], copy=False))
                    parts.append(raw.view(np.uint8).data)
        return parts

    def decode(self, manifest: Manifest, index: int, data: memoryview, base: Sequence[_Array]) -> Sequence[_Array]:
        """Coded pieces as float32, raw ones as views of ``data``."""
        found = list[_Array]()
        with np.errstate(all="ignore"):
            pieces = zip(manifest.pieces[index], self._split(manifest, index, data), base, strict=True)
            for piece, coded, theirs in pieces:
                dtype = manifest.variables[piece.variable].dtype
                if self._is_coded(manifest, piece):
                    values = np.empty(piece.count, np.float32)
                    self.decode_piece(dtype, coded, theirs, values)
                    found.append(values)
                else:
                    found.append(coded.view(DTYPES[dtype]))
        return found

    def decode_into(self, manifest: Manifest, flat: _Bytes, index: int, data: memoryview, base: _Bytes) -> None:
        """Decodes fragment ``index`` (of the right size) into a flat buffer, without a copy between. ``flat`` may be
        ``base``."""
        with np.errstate(all="ignore"):
            for piece, coded, theirs, room in zip(
                manifest.pieces[index],
                self._split(manifest, index, data),
                manifest.piece_arrays(index, base),
                manifest.piece_arrays(index, flat),
                strict=True,
            ):
                if self._is_coded(manifest, piece):
                    self.decode_piece(manifest.variables[piece.variable].dtype, coded, theirs, room)
                else:
                    room.view(np.uint8)[...] = coded

    def _is_coded(self, manifest: Manifest, piece: Piece) -> bool:
        variable = manifest.variables[piece.variable]
        if variable.dtype not in self.dtypes or variable.size < LEAST_ELEMENTS:
            return False
        return self.coded_size_bytes(piece.count) < piece.count * DTYPES[variable.dtype].itemsize

    def _size_bytes(self, manifest: Manifest, piece: Piece) -> int:
        if self._is_coded(manifest, piece):
            return self.coded_size_bytes(piece.count)
        return piece.count * DTYPES[manifest.variables[piece.variable].dtype].itemsize

    def _split(self, manifest: Manifest, index: int, data: memoryview) -> list[_Bytes]:
        """The bytes of each piece."""
        whole, parts, at = np.frombuffer(data, np.uint8), list[_Bytes](), 0
        for piece in manifest.pieces[index]:
            begin, at = at, at + self._size_bytes(manifest, piece)
            parts.append(whole[begin:at])
        return parts


# For the encoding of a piece. All arithmetic is float32, one operation at a time: the same bits on every machine.


def steps(count: int) -> Iterator[slice]:
    """Cuts ``count`` elements into parts whose temporary arrays fit into a core's cache; whole blocks but the last."""
    return (slice(start, min(start + STEP_ELEMENTS, count)) for start in range(0, count, STEP_ELEMENTS))


def widened(array: _Array) -> _Floats:
    """As float32; exact for the dtypes that can be coded."""
    return array.astype(np.float32, copy=False)


def finite_or_zero(base: _Floats) -> _Floats:
    """The base where finite, elsewhere 0: what a change refers to when it is not finite or huge."""
    return np.where(np.isfinite(base), base, np.float32(0))


def nan_like(base: _Floats) -> _Floats:
    """NaN: the base's own where it is NaN, so that a NaN that did not change keeps its bits."""
    return np.where(np.isnan(base), base, np.float32(np.nan))
