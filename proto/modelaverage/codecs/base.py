"""The interface of a codec: an encoding of a fragment's elements on the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import DTYPES, MAX_FRAGMENT_SIZE_BYTES, MAX_RUN, Manifest

__all__ = ["Codec"]


_Array = NDArray[np.generic]


class Codec(ABC):
    """Encodes and decodes the fragments of any manifest. A codec defines four members; the others use them.

    A codec carries the change of a fragment: what it encodes is relative to the *base*, a center that sender and
    receiver both have, bit for bit. `raw` ignores the base.

    A codec has no state and is deterministic: equal values and bases give equal bytes, so a repeated push sends the
    same bytes. Values that equal the base bit for bit are decoded to the base bit for bit. The size of an encoded
    fragment depends only on the manifest, never on the values; it is at least one byte, and at most twice the size of
    the raw fragment. A codec writes variables that it does not support, such as small ones, raw.

    Attributes:
        in_place: whether the encoded bytes of a fragment equal its bytes in the flat buffer, whatever the base, so that
            a transport may send from the buffer and receive into it.
    """

    in_place: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The codec's name in messages and arguments."""

    @abstractmethod
    def size_bytes(self, manifest: Manifest, index: int) -> int:
        """The size of encoded fragment ``index``."""

    @abstractmethod
    def encode(
        self, manifest: Manifest, index: int, values: Sequence[_Array], base: Sequence[_Array]
    ) -> Sequence[memoryview]:
        """Encodes fragment ``index``.

        Args:
            manifest: the layout of the variables.
            index: the fragment.
            values: the values of each of ``manifest.pieces[index]``: one-dimensional, of the variable's dtype, at any
                alignment. 16-bit variables may be given as float32; what is written raw is rounded.
            base: the base of each piece, of the variable's dtype.

        Returns:
            Pieces of bytes to be joined, `size_bytes` in total. They may be views of ``values``.
        """

    @abstractmethod
    def decode(self, manifest: Manifest, index: int, data: memoryview, base: Sequence[_Array]) -> Sequence[_Array]:
        """The values of each of ``manifest.pieces[index]``: one-dimensional, of the variable's dtype (16-bit variables
        may be decoded as float32). They may be views of ``data``, never of ``base``.

        Args:
            manifest: the layout of the variables.
            index: the fragment.
            data: an encoded fragment of the right size (`check_size`), at any alignment.
            base: the base of each piece, of the variable's dtype.
        """

    # Conversion from and to variables and flat buffers.

    def encode_variables(
        self, manifest: Manifest, index: int, variables: Sequence[memoryview], base: NDArray[np.uint8]
    ) -> Sequence[memoryview]:
        """Encodes fragment ``index`` of a model whose variables are separate arrays.

        Args:
            manifest: the layout of the variables.
            index: the fragment.
            variables: the bytes of every variable, in manifest order.
            base: the base, a flat buffer (uint8, `buffer_size_bytes`).
        """
        values = [
            np.frombuffer(data, DTYPES[manifest.variables[piece.variable].dtype])
            for piece, data in zip(manifest.pieces[index], manifest.piece_bytes(index, variables), strict=True)
        ]
        return self.encode(manifest, index, values, manifest.piece_arrays(index, base))

    def decode_into(
        self, manifest: Manifest, flat: NDArray[np.uint8], index: int, data: memoryview, base: NDArray[np.uint8]
    ) -> None:
        """Decodes fragment ``index`` (of the right size) into a flat buffer. ``flat`` may be ``base``."""
        values = self.decode(manifest, index, data, manifest.piece_arrays(index, base))
        for room, decoded in zip(manifest.piece_arrays(index, flat), values, strict=True):
            room[...] = decoded

    # Sizes.

    def max_size_bytes(self, manifest: Manifest) -> int:
        """The size of the largest encoded fragment."""
        return 2 * manifest.fragment_size_bytes

    def run_size_bytes(self, manifest: Manifest, first: int, end: int) -> int:
        """The total size of encoded fragments ``first`` to ``end`` - 1."""
        return sum(self.size_bytes(manifest, index) for index in range(first, end))

    def run_end(self, manifest: Manifest, first: int, size_bytes: int) -> int | None:
        """The index after the last of the consecutive encoded fragments, from ``first`` on, that have ``size_bytes``
        bytes together; None if no number of whole fragments has that size, or a message cannot hold them."""
        if not 0 < size_bytes <= MAX_FRAGMENT_SIZE_BYTES:
            return None
        for index in range(first, min(first + MAX_RUN, manifest.fragment_count)):
            size_bytes -= self.size_bytes(manifest, index)
            if size_bytes <= 0:
                return index + 1 if size_bytes == 0 else None
        return None

    def check_size(self, manifest: Manifest, index: int, data: memoryview) -> None:
        """Raises ProtocolError (FRAGMENT_SIZE_WRONG) unless the bytes have the size of encoded fragment ``index``."""
        expected = self.size_bytes(manifest, index)
        if len(data) != expected:
            how = "the manifest" if self.in_place else f"codec {self.name}"
            raise refusal(
                Reason.FRAGMENT_SIZE_WRONG, f"fragment {index} has {len(data)} bytes; {how} gives it {expected}"
            )

    def split_run(self, manifest: Manifest, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The index and bytes of every encoded fragment in a message. Raises ProtocolError (FRAGMENT_SIZE_WRONG) before
        yielding any, unless they are whole fragments."""
        if self.run_end(manifest, first, len(data)) is None:
            self.check_size(manifest, first, data)
        yield from self.split_range(manifest, first, data)

    def split_range(self, manifest: Manifest, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The index and bytes of any number of whole encoded fragments that are concatenated in memory."""
        at = 0
        while at < len(data) and first < manifest.fragment_count:
            begin, at = at, at + self.size_bytes(manifest, first)
            yield first, data[begin:at]
            first += 1
