"""What a codec is: how the elements of a fragment are written on the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import DTYPES, MAX_FRAGMENT_SIZE_BYTES, MAX_RUN, Manifest

__all__ = ["Codec"]


class Codec(ABC):
    """Codes the fragments of any manifest. A codec has four members of its own; the others follow from them.

    A codec has no state and is deterministic: equal values give equal bytes, so a push that is made again sends the
    same bytes. The size of a coded fragment depends on the manifest only, never on the values; it is at least one
    byte, and at most twice the size of the raw fragment. What a codec does not handle, such as other dtypes than
    float32 and small variables, it writes raw.

    Attributes:
        in_place: whether the coded bytes of a fragment are its bytes in the flat buffer, so that a transport may send
            from there and receive there.
    """

    in_place: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What push headers call it."""

    @abstractmethod
    def size_bytes(self, manifest: Manifest, index: int) -> int:
        """The size of coded fragment ``index``."""

    @abstractmethod
    def encode(self, manifest: Manifest, index: int, pieces: Sequence[memoryview]) -> Sequence[memoryview]:
        """Codes fragment ``index``.

        Args:
            manifest: how the variables are cut.
            index: which fragment.
            pieces: the bytes of each of ``manifest.pieces[index]``, little-endian, at any address.

        Returns:
            Bytes to be joined, `size_bytes` together. They may be views of ``pieces``.
        """

    @abstractmethod
    def decode(self, manifest: Manifest, index: int, data: memoryview) -> Sequence[NDArray[np.generic]]:
        """The values of each of ``manifest.pieces[index]``: one-dimensional, of the variable's dtype (float32 will do
        for 16 bits). They may be views of ``data``.

        Args:
            manifest: how the variables are cut.
            index: which fragment.
            data: a coded fragment of the right size (`check_size`), at any address.
        """

    # From and to variables and flat buffers.

    def encode_variables(self, manifest: Manifest, index: int, values: Sequence[memoryview]) -> Sequence[memoryview]:
        """Codes fragment ``index`` of a model whose variables lie apart; ``values`` are their bytes, in manifest
        order. As `encode` otherwise."""
        return self.encode(manifest, index, manifest.piece_bytes(index, values))

    def encode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, end: int) -> Sequence[memoryview]:
        """Codes consecutive fragments, up to but not with ``end``, of a flat buffer (uint8, `buffer_size_bytes`)."""
        parts = list[memoryview]()
        for index in range(first, end):
            pieces = [flat[begin:stop].data for begin, stop in manifest.piece_bounds(index)]
            parts.extend(self.encode(manifest, index, pieces))
        return parts

    def decode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, data: memoryview) -> int:
        """Decodes one coded fragment or a run of them into a flat buffer; which fragment comes next.

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
        """No coded fragment is larger."""
        return 2 * manifest.fragment_size_bytes

    def run_size_bytes(self, manifest: Manifest, first: int, end: int) -> int:
        """The size of consecutive coded fragments, up to but not with ``end``."""
        return sum(self.size_bytes(manifest, index) for index in range(first, end))

    def run_end(self, manifest: Manifest, first: int, size_bytes: int) -> int | None:
        """The index behind the last of the consecutive coded fragments that have ``size_bytes`` bytes together, from
        ``first`` on; None if no whole ones have, or a message cannot hold them."""
        if not 0 < size_bytes <= MAX_FRAGMENT_SIZE_BYTES:
            return None
        for index in range(first, min(first + MAX_RUN, manifest.fragment_count)):
            size_bytes -= self.size_bytes(manifest, index)
            if size_bytes <= 0:
                return index + 1 if size_bytes == 0 else None
        return None

    def check_size(self, manifest: Manifest, index: int, data: memoryview) -> None:
        """Raises ProtocolError (FRAGMENT_SIZE_WRONG) unless the bytes are as many as coded fragment ``index`` has."""
        expected = self.size_bytes(manifest, index)
        if len(data) != expected:
            how = "the manifest" if self.in_place else f"codec {self.name}"
            raise refusal(
                Reason.FRAGMENT_SIZE_WRONG, f"fragment {index} has {len(data)} bytes; {how} gives it {expected}"
            )

    def split_run(self, manifest: Manifest, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Index and bytes of every coded fragment in a message. Raises ProtocolError (FRAGMENT_SIZE_WRONG), before the
        first, unless they are whole fragments."""
        if self.run_end(manifest, first, len(data)) is None:
            self.check_size(manifest, first, data)
        yield from self.split_range(manifest, first, data)

    def split_range(self, manifest: Manifest, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Index and bytes of whole coded fragments, however many, that lie in memory one behind the other."""
        at = 0
        while at < len(data) and first < manifest.fragment_count:
            begin, at = at, at + self.size_bytes(manifest, first)
            yield first, data[begin:at]
            first += 1
