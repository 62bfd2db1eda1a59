"""The interface of a codec: an encoding of a fragment's elements on the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import DTYPES, MAX_FRAGMENT_SIZE_BYTES, MAX_RUN, Manifest

__all__ = ["Codec"]


class Codec(ABC):
    """Encodes and decodes the fragments of any manifest. A codec defines four members; the others use them.

    A codec has no state and is deterministic: equal values give equal bytes, so a repeated push sends the same bytes.
    The size of an encoded fragment depends only on the manifest, never on the values; it is at least one byte, and at
    most twice the size of the raw fragment. A codec writes variables that it does not support, such as dtypes other
    than float32 and small variables, raw.

    Attributes:
        in_place: whether the encoded bytes of a fragment equal its bytes in the flat buffer, so that a transport may
            send from the buffer and receive into it.
    """

    in_place: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The codec's name in push headers."""

    @abstractmethod
    def size_bytes(self, manifest: Manifest, index: int) -> int:
        """The size of encoded fragment ``index``."""

    @abstractmethod
    def encode(self, manifest: Manifest, index: int, pieces: Sequence[memoryview]) -> Sequence[memoryview]:
        """Encodes fragment ``index``.

        Args:
            manifest: the layout of the variables.
            index: the fragment.
            pieces: the bytes of each of ``manifest.pieces[index]``, little-endian, at any alignment.

        Returns:
            Pieces of bytes to be joined, `size_bytes` in total. They may be views of ``pieces``.
        """

    @abstractmethod
    def decode(self, manifest: Manifest, index: int, data: memoryview) -> Sequence[NDArray[np.generic]]:
        """The values of each of ``manifest.pieces[index]``: one-dimensional, of the variable's dtype (16-bit types may
        be decoded as float32). They may be views of ``data``.

        Args:
            manifest: the layout of the variables.
            index: the fragment.
            data: an encoded fragment of the right size (`check_size`), at any alignment.
        """

    # Conversion from and to variables and flat buffers.

    def encode_variables(self, manifest: Manifest, index: int, values: Sequence[memoryview]) -> Sequence[memoryview]:
        """Encodes fragment ``index`` of a model whose variables are separate arrays; ``values`` are their bytes, in
        manifest order. Otherwise like `encode`."""
        return self.encode(manifest, index, manifest.piece_bytes(index, values))

    def encode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, end: int) -> Sequence[memoryview]:
        """Encodes fragments ``first`` to ``end`` - 1 of a flat buffer (uint8, `buffer_size_bytes`)."""
        parts = list[memoryview]()
        for index in range(first, end):
            pieces = [flat[begin:stop].data for begin, stop in manifest.piece_bounds(index)]
            parts.extend(self.encode(manifest, index, pieces))
        return parts

    def decode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, data: memoryview) -> int:
        """Decodes an encoded fragment or run into a flat buffer. Returns the index after the last fragment.

        Raises:
            ProtocolError: FRAGMENT_SIZE_WRONG; nothing was written.
        """
        end = first
        for index, part in self.split_run(manifest, first, data):
            pieces = manifest.pieces[index]
            bounds = manifest.piece_bounds(index)
            for piece, (begin, stop), values in zip(pieces, bounds, self.decode(manifest, index, part), strict=True):
                flat[begin:stop].view(DTYPES[manifest.variables[piece.variable].dtype])[:] = values
            end = index + 1
        return end

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
