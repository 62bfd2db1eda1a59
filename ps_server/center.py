"""The buffers of the center variables: accumulate a fragment, finish it, commit, read. No rules of the round here.

There are two flat buffers. Readers see the current center; the round in progress adds into the other one, divides
there, and a commit swaps them. So readers never meet a half-made center, and memory is twice the model however many
workers there are (16-bit variables are summed in float32 beside it). A buffer that somebody still reads is left to
them, and a fresh one takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal
from modelaverage.manifest import DTYPES, Manifest

__all__ = ["Buffer", "Center"]

_Array = NDArray[np.generic]


class Buffer:
    """One flat buffer, and how many streams still read it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._readers = 0
        self._bytes: NDArray[np.uint8] = np.zeros(manifest.buffer_size_bytes, np.uint8)
        flat = [array.reshape(-1) for array in manifest.arrays(self._bytes).values()]
        # By fragment: the part of each variable that lies in it, typed.
        self.parts: list[list[_Array]] = [
            [flat[piece.variable][piece.start : piece.start + piece.count] for piece in pieces]
            for pieces in manifest.pieces
        ]

    def fragment(self, index: int) -> memoryview:
        """The bytes of a fragment; a view."""
        start, end = self._manifest.fragment_bounds(index)
        return self._bytes[start:end].data

    @contextmanager
    def reading(self) -> Iterator[Buffer]:
        """As long as the context lives, no later round writes into this buffer."""
        self._readers += 1
        try:
            yield self
        finally:
            self._readers -= 1

    @property
    def in_use(self) -> bool:
        """Whether somebody reads it."""
        return self._readers > 0


class Center:
    """The center variables and the average in the making.

    Args:
        manifest: what the center variables are; all are zero until `load` has set every fragment.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.current = Buffer(manifest)
        self.next = Buffer(manifest)
        # Sums of 16-bit variables, in float32; None where the next buffer itself is precise enough.
        self._wide: list[list[NDArray[np.float32] | None]] = [
            [
                np.zeros(piece.count, np.float32) if self._dtype(piece.variable).itemsize == 2 else None
                for piece in pieces
            ]
            for pieces in manifest.pieces
        ]

    def check_size(self, index: int, data: memoryview) -> None:
        """Raises ProtocolError (FRAGMENT_SIZE_WRONG) unless the bytes are as many as fragment ``index`` has."""
        start, end = self.manifest.fragment_bounds(index)
        if len(data) != end - start:
            raise refusal(
                Reason.FRAGMENT_SIZE_WRONG,
                f"fragment {index} has {len(data)} bytes; the manifest gives it {end - start}",
            )

    def load(self, index: int, data: memoryview) -> None:
        """Sets a fragment of the current center. Raises ProtocolError (FRAGMENT_SIZE_WRONG)."""
        self.check_size(index, data)
        for part, values in zip(self.current.parts[index], self._values(index, data), strict=True):
            part[...] = values

    def accumulate(self, index: int, data: memoryview, weight: float, first: bool) -> int:
        """Adds weight * values to the sum of fragment ``index``, or starts the sum with it.

        Sums are in the variable's own precision, of 16-bit variables in float32. The caller has checked the size.

        Returns:
            How many of the values were not finite. They are added as they are.
        """
        nonfinite = 0
        with np.errstate(all="ignore"):
            for total, values in zip(self._sums(index), self._values(index, data), strict=True):
                weighted = values if weight == 1.0 else np.multiply(values, total.dtype.type(weight), dtype=total.dtype)
                if first:
                    total[...] = weighted
                else:
                    np.add(total, weighted, out=total)
                # One fast pass finds out whether there is anything to count.
                if not np.isfinite(np.sum(values, dtype=total.dtype)):
                    nonfinite += values.size - int(np.count_nonzero(np.isfinite(values)))
        return nonfinite

    def finish(self, index: int, total_weight: float, untouched: frozenset[int]) -> None:
        """Turns the sum of fragment ``index`` into the average: sum, then divide. Equal values of two or four workers
        stay as they are; of other numbers they may move by a last bit (with a reciprocal, by more).

        ``untouched`` variables, by number, keep the current center's bytes.
        """
        pieces, outs, olds = self.manifest.pieces[index], self.next.parts[index], self.current.parts[index]
        with np.errstate(all="ignore"):
            for piece, total, out, old in zip(pieces, self._sums(index), outs, olds, strict=True):
                if piece.variable in untouched:
                    out[...] = old
                    continue
                if total_weight != 1.0:
                    np.divide(total, total.dtype.type(total_weight), out=total)
                if total is not out:
                    out[...] = total

    def commit(self) -> None:
        """The next buffer, whose fragments are all finished, becomes the center."""
        spare = self.current
        self.current = self.next
        self.next = Buffer(self.manifest) if spare.in_use else spare

    def _sums(self, index: int) -> list[_Array]:
        return [
            out if wide is None else wide for out, wide in zip(self.next.parts[index], self._wide[index], strict=True)
        ]

    def _values(self, index: int, data: memoryview) -> Iterator[_Array]:
        for piece in self.manifest.pieces[index]:
            yield np.frombuffer(data, self._dtype(piece.variable), piece.count, piece.offset_bytes)

    def _dtype(self, variable: int) -> np.dtype[np.generic]:
        return DTYPES[self.manifest.variables[variable].dtype]
