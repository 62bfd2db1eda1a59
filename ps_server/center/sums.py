"""The sums of a round: contributions are added when they arrive, or when all have arrived, and divided at the end.

Sums of float32 and float64 variables lie in the buffer of the next center and take no extra memory. Sums of 16-bit
variables are separate float32 arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.manifest import DTYPES, Manifest, Piece
from ps_server.center.buffers import Buffer
from ps_server.center.nonfinite import count_nonfinite
from ps_server.center.uniform import uniform_fragments

__all__ = ["Contribution", "Sums"]

_Array = NDArray[np.generic]


class Contribution(NamedTuple):
    """A worker's bytes for one fragment.

    Args:
        worker_id: the worker.
        weight: the factor for the values.
        data: the encoded fragment; of the right size, at any alignment.
        codec: decodes it.
    """

    worker_id: str
    weight: float
    data: memoryview
    codec: Codec = RAW


class Sums:
    """The sums of one round, by fragment.

    Args:
        manifest: the manifest of the center.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # Deferred contributions (in shared memory), by fragment whose sum has not begun.
        self._deferred: dict[int, list[Contribution]] = {}
        # Sums of 16-bit variables; None where the next buffer itself is precise enough.
        self._wide: list[list[NDArray[np.float32] | None]] = []
        self._uniform = uniform_fragments(manifest)
        self._wide_whole: list[NDArray[np.float32] | None] = []  # of uniform fragments; `_wide` has views of them
        for pieces, uniform in zip(manifest.pieces, self._uniform, strict=True):
            if uniform is None or uniform.dtype.itemsize != 2:
                self._wide_whole.append(None)
                self._wide.append([_wide_room(manifest, piece) for piece in pieces])
                continue
            whole = np.zeros((uniform.end - uniform.start) // 2, np.float32)
            self._wide_whole.append(whole)
            starts = [piece.offset_bytes // 2 for piece in pieces]
            self._wide.append([whole[at : at + piece.count] for at, piece in zip(starts, pieces, strict=True)])

    @staticmethod
    def memory_bytes(manifest: Manifest) -> int:
        """The memory that sums take in addition to the next buffer."""
        return sum(2 * v.size_bytes for v in manifest.variables if DTYPES[v.dtype].itemsize == 2)

    def accumulate(
        self, into: Buffer, index: int, contribution: Contribution, first: bool, base: Buffer
    ) -> Counter[str]:
        """Adds weight * values to the sum of fragment ``index``. The ``first`` contribution starts the sum and discards
        earlier and deferred contributions.

        Args:
            into: the buffer of the next center.
            index: the fragment.
            contribution: the values to add.
            first: whether it starts the sum.
            base: the center that encoded contributions are relative to.

        Returns:
            How many of the values added now were not finite, by worker id. They are added unchanged.
        """
        # These bytes do not stay valid, so the sum starts now and includes the deferred contributions.
        waiting = self._deferred.pop(index, [])
        if first:
            waiting = []
        nonfinite: Counter[str] = Counter()
        for position, each in enumerate([*waiting, contribution]):
            starts = position == 0 if waiting else first
            nonfinite[each.worker_id] += self._add(into, index, each, starts, base)
        return nonfinite

    def defer(self, into: Buffer, index: int, contribution: Contribution, first: bool, base: Buffer) -> Counter[str]:
        """Like `accumulate`, for bytes that stay valid until the round is over. While all contributions to a fragment
        are deferred, `average` sums them at the end."""
        if first:
            self._deferred[index] = [contribution]
        elif index in self._deferred:
            self._deferred[index].append(contribution)
        else:
            return self.accumulate(into, index, contribution, first, base)
        return Counter()

    def clear(self) -> None:
        """Discards deferred contributions; the next contribution to a fragment must be its first."""
        self._deferred.clear()

    def of(self, into: Buffer, index: int) -> list[_Array]:
        """The sum of each piece of fragment ``index``, or the average after `average`: float64 for float64 variables,
        else float32."""
        return [part if wide is None else wide for part, wide in zip(into.parts[index], self._wide[index], strict=True)]

    def whole(self, into: Buffer, index: int, but: Collection[int]) -> tuple[_Array, _Array] | None:
        """The sum of fragment ``index`` as one array, as in `of`, and its place in the next center; padding is zero in
        both. None: it has variables of several types, or one of those in ``but``."""
        uniform = self._uniform[index]
        if uniform is None or uniform.has(but):
            return None
        out, wide = uniform.of(into.flat), self._wide_whole[index]
        return (out if wide is None else wide), out

    def average(
        self, into: Buffer, index: int, total_weight: float, but: Collection[int], base: Buffer
    ) -> Counter[str]:
        """Divides the sum of fragment ``index`` by ``total_weight``, except for the variables in ``but``. Division, not
        multiplication by a reciprocal, keeps equal values of two or four workers exact, and others to the last bit. If
        all contributions are deferred, they are summed now, in the order of worker ids.

        Returns:
            How many of the values summed here were not finite, by worker id.
        """
        deferred = sorted(self._deferred.pop(index, []), key=lambda contribution: contribution.worker_id)
        whole = self.whole(into, index, but)
        if whole is not None and all(contribution.codec is RAW for contribution in deferred):
            return self._average_whole(whole[0], index, total_weight, deferred)
        by_contribution = [self._values(index, contribution, base) for contribution in deferred]
        weights = [contribution.weight for contribution in deferred]
        nonfinite: Counter[str] = Counter()
        for number, (piece, total) in enumerate(zip(self._manifest.pieces[index], self.of(into, index), strict=True)):
            if piece.variable in but:
                continue
            values = [pieces[number] for pieces in by_contribution]
            _sum(total, values, weights)
            if total_weight != 1.0:
                np.divide(total, total.dtype.type(total_weight), out=total)
            if deferred and count_nonfinite(total):
                nonfinite.update({c.worker_id: count_nonfinite(v) for c, v in zip(deferred, values, strict=True)})
        return nonfinite

    def _average_whole(
        self, total: _Array, index: int, total_weight: float, deferred: Sequence[Contribution]
    ) -> Counter[str]:
        """As `average`, for a uniform fragment."""
        _sum(total, [self._values_whole(index, each) for each in deferred], [each.weight for each in deferred])
        self._clear_padding(total, index)
        if total_weight != 1.0:
            np.divide(total, total.dtype.type(total_weight), out=total)
        if not deferred or not count_nonfinite(total):
            return Counter()
        return Counter({each.worker_id: self._count_in_pieces(index, each) for each in deferred})

    def _values_whole(self, index: int, contribution: Contribution) -> _Array:
        uniform = self._uniform[index]
        assert uniform is not None
        return np.frombuffer(contribution.data, uniform.dtype)

    def _clear_padding(self, total: _Array, index: int) -> None:
        uniform = self._uniform[index]
        assert uniform is not None
        if uniform.padding.size:
            total[uniform.padding] = 0

    def _count_in_pieces(self, index: int, contribution: Contribution) -> int:
        """How many values, padding not counted, are not finite in a raw contribution."""
        pieces = RAW.decode(self._manifest, index, contribution.data)
        return sum(map(count_nonfinite, pieces))

    def _add(self, into: Buffer, index: int, contribution: Contribution, first: bool, base: Buffer) -> int:
        nonfinite = 0
        whole = self.whole(into, index, ()) if contribution.codec is RAW else None
        if whole is not None:
            with np.errstate(all="ignore"):
                values = self._values_whole(index, contribution)
                _add_weighted(whole[0], values, contribution.weight, first)
                self._clear_padding(whole[0], index)
                return self._count_in_pieces(index, contribution) if count_nonfinite(values) else 0
        with np.errstate(all="ignore"):
            for total, values in zip(self.of(into, index), self._values(index, contribution, base), strict=True):
                _add_weighted(total, values, contribution.weight, first)
                nonfinite += count_nonfinite(values)
        return nonfinite

    def _values(self, index: int, contribution: Contribution, base: Buffer) -> Sequence[_Array]:
        return contribution.codec.decode(self._manifest, index, contribution.data, base.parts[index])


def _wide_room(manifest: Manifest, piece: Piece) -> NDArray[np.float32] | None:
    """Room for the sum of a piece; None: the next buffer itself is precise enough."""
    is_wide = DTYPES[manifest.variables[piece.variable].dtype].itemsize == 2
    return np.zeros(piece.count, np.float32) if is_wide else None


def _sum(total: _Array, values: list[_Array], weights: list[float]) -> None:
    """Computes a sum from all its summands, with one pass fewer than one by one; without summands, does nothing."""
    if len(values) > 1 and weights[0] == weights[1] == 1.0:
        np.add(values[0], values[1], out=total, dtype=total.dtype)  # otherwise 16-bit values would be added in 16 bits
        begun = 2
    else:
        begun = 0
    for position in range(begun, len(values)):
        _add_weighted(total, values[position], weights[position], first=position == 0)


def _add_weighted(total: _Array, values: _Array, weight: float, first: bool) -> None:
    weighted = values if weight == 1.0 else np.multiply(values, total.dtype.type(weight), dtype=total.dtype)
    if first:
        total[...] = weighted
    else:
        np.add(total, weighted, out=total)
