"""One model and its shards: splits local variables for the servers, and joins their centers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from ma_client.transports.staging import Memory, Staging, read_only
from ma_client.values.same import SameArrays
from modelaverage.manifest import ALIGNMENT_BYTES, DTYPES, Manifest, Variable
from modelaverage.placement import assemble, gather

__all__ = ["Assembly"]

_Arrays = Mapping[str, NDArray[Any]]


class Assembly:
    """The shards of one model.

    Args:
        manifests: the manifest of every shard, in the order of the servers.
        addresses: the addresses of the servers, for error messages.

    Attributes:
        manifest: the manifest of the whole model.
        shards: the shards' manifests.
        stagings: receive the shards' centers; adjacent in memory, so that most variables are contiguous there.

    Raises:
        ConflictError: MANIFEST_MISMATCH: the shards do not belong together.
    """

    def __init__(self, manifests: Sequence[Manifest], addresses: Sequence[str]) -> None:
        self.manifest = assemble(manifests, addresses)
        self.shards = tuple(manifests)
        starts, end = [], 0
        for manifest in manifests:
            starts.append(end)
            end += -(-manifest.buffer_size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._memory = Memory(end)
        self.stagings = [Staging(m, self._memory, start) for m, start in zip(manifests, starts, strict=True)]
        # By whole variable: from the first byte of its first part to the end of its last.
        extents = dict[int, tuple[int, int]]()
        for manifest, start in zip(manifests, starts, strict=True):
            for number, (variable, offset) in enumerate(zip(manifest.variables, manifest.offsets_bytes, strict=True)):
                whole, at = _number(number, variable), start + offset
                extents[whole] = extents.get(whole, (at, at))[0], at + variable.size_bytes
        self._extents = [extents[number] for number in range(len(extents))]

    def cut(self, values: Sequence[memoryview]) -> list[list[memoryview]]:
        """The bytes of the variables of each shard; views.

        Args:
            values: the bytes of the whole variables, in manifest order.
        """
        return [
            [
                values[number]
                if variable.part is None
                else _slice(values[variable.part.variable], variable.part.start, variable.size, variable.dtype)
                for number, variable in enumerate(manifest.variables)
            ]
            for manifest in self.shards
        ]

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each whole variable, by name."""
        return {variable.name: number for number, variable in enumerate(self.manifest.variables)}

    def cut_numbers(self, numbers: Collection[int]) -> list[list[int]]:
        """For each shard, the numbers of its variables that belong to these whole variables; ascending."""
        if not numbers:
            return [[] for _ in self.shards]
        return [
            [number for number, variable in enumerate(manifest.variables) if _number(number, variable) in numbers]
            for manifest in self.shards
        ]

    def join_numbers(self, by_shard: Sequence[Collection[int]]) -> frozenset[int]:
        """The whole variables all of whose parts are among these variables of the shards."""
        if not any(by_shard):
            return frozenset()
        missing = {
            _number(number, variable)
            for manifest, numbers in zip(self.shards, map(frozenset, by_shard), strict=True)  # a list is slow to search
            for number, variable in enumerate(manifest.variables)
            if number not in numbers
        }
        return frozenset(range(len(self.manifest.variables))) - missing

    def join(self, elsewhere: Sequence[_Arrays | None]) -> _Arrays:
        """The whole variables by name; read-only views where their parts are adjacent in memory.

        Args:
            elsewhere: for each shard, its variables by name if they did not arrive in its staging.
        """
        if self._all_side_by_side and all(arrays is None for arrays in elsewhere):
            return self._staged
        if all(arrays is not None for arrays in elsewhere):
            self.release()
        if len(elsewhere) == 1 and elsewhere[0] is not None:
            return elsewhere[0]
        shards = [staging.arrays if a is None else a for staging, a in zip(self.stagings, elsewhere, strict=True)]
        return gather(self.manifest, shards)

    def overlaps(self, array: NDArray[Any]) -> bool:
        """Whether an array may overlap memory that the next center will overwrite."""
        return self._memory.overlaps(array)

    def release(self) -> None:
        """Frees the memory of the stagings until a center arrives there again."""
        self.__dict__.pop("_staged", None)
        self._memory.release()

    @cached_property
    def _all_side_by_side(self) -> bool:
        """Whether the parts of every variable are adjacent in the stagings."""
        sizes = [end - start for start, end in self._extents]
        return sizes == [variable.size_bytes for variable in self.manifest.variables]

    @cached_property
    def _staged(self) -> _Arrays:
        memory = self._memory.bytes
        views = {
            v.name: memory[start:end].view(DTYPES[v.dtype]).reshape(v.shape)
            for v, (start, end) in zip(self.manifest.variables, self._extents, strict=True)
        }
        return SameArrays(read_only(views))


def _number(number: int, variable: Variable) -> int:
    """The number of the whole variable that a shard's variable belongs to."""
    return number if variable.part is None else variable.part.variable


def _slice(values: memoryview, start: int, count: int, dtype: str) -> memoryview:
    itemsize = DTYPES[dtype].itemsize
    return values[start * itemsize : (start + count) * itemsize]
