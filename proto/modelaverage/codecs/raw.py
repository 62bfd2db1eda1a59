"""The codec `raw`: a fragment is its bytes in the flat buffer, padding included. Nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs.base import Codec
from modelaverage.manifest import DTYPES, Manifest

__all__ = ["RAW", "Raw"]

_Array = NDArray[np.generic]
_NO_BASE: NDArray[np.uint8] = np.zeros(0, np.uint8)


class Raw(Codec):
    """Every element in its memory representation, little-endian. Encoded parts and decoded values are views."""

    in_place = True

    @property
    def name(self) -> str:
        """``raw``."""
        return "raw"

    def size_bytes(self, manifest: Manifest, index: int) -> int:
        """The size of the fragment in the flat buffer."""
        start, end = manifest.fragment_bounds(index)
        return end - start

    def encode(
        self,
        manifest: Manifest,
        index: int,
        values: Sequence[_Array],
        base: Sequence[_Array],  # noqa: ARG002
    ) -> Sequence[memoryview]:
        """The values, with padding between them."""
        pieces = [
            each.astype(DTYPES[manifest.variables[piece.variable].dtype], copy=False).view(np.uint8).data
            for piece, each in zip(manifest.pieces[index], values, strict=True)
        ]
        return manifest.padded(index, pieces)

    def decode(
        self,
        manifest: Manifest,
        index: int,
        data: memoryview,
        base: Sequence[_Array] = (),  # noqa: ARG002
    ) -> Sequence[_Array]:
        """Views of ``data``."""
        return [
            np.frombuffer(data, DTYPES[manifest.variables[piece.variable].dtype], piece.count, piece.offset_bytes)
            for piece in manifest.pieces[index]
        ]

    # Shortcuts that do not need the pieces, nor a base.

    def encode_variables(
        self,
        manifest: Manifest,
        index: int,
        variables: Sequence[memoryview],
        base: NDArray[np.uint8] = _NO_BASE,  # noqa: ARG002
    ) -> Sequence[memoryview]:
        """Views of the variables."""
        return manifest.fragment_parts(index, variables)

    def encode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, end: int) -> memoryview:
        """Fragments ``first`` to ``end`` - 1 of a flat buffer; a view."""
        return flat[manifest.fragment_bounds(first)[0] : manifest.fragment_bounds(end - 1)[1]].data

    def decode_run(self, manifest: Manifest, flat: NDArray[np.uint8], first: int, data: memoryview) -> int:
        """Copies a fragment or a run into a flat buffer. Returns the index after the last fragment.

        Raises:
            ProtocolError: FRAGMENT_SIZE_WRONG; nothing was written.
        """
        end = self.run_end(manifest, first, len(data))
        if end is None:
            self.check_size(manifest, first, data)
            end = first + 1
        start = manifest.fragment_bounds(first)[0]
        flat[start : start + len(data)] = np.frombuffer(data, np.uint8)
        return end

    def max_size_bytes(self, manifest: Manifest) -> int:
        """The size of all fragments but the last."""
        return manifest.fragment_size_bytes

    def run_size_bytes(self, manifest: Manifest, first: int, end: int) -> int:
        """From the first fragment's first byte to the last one's end."""
        return manifest.fragment_bounds(end - 1)[1] - manifest.fragment_bounds(first)[0] if first < end else 0

    def run_end(self, manifest: Manifest, first: int, size_bytes: int) -> int | None:
        """As `Manifest.run_end`."""
        return manifest.run_end(first, size_bytes)


RAW = Raw()
"""The default codec."""
