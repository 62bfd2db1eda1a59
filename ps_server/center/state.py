"""The state of an outer optimizer for one center: arrays by slot and variable, and views of their pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, Manifest
from modelaverage.outer.base import OuterOptimizer, Slots, Values, slots_of, summed_in

__all__ = ["OuterState"]

_NOTHING: Slots = {}


class OuterState:
    """The optimizer state of one center, initially all zero.

    Args:
        manifest: the manifest of the center.
        outer: the optimizer. Without slots and masters the state takes no memory.

    Attributes:
        arrays: by slot, then by variable, in manifest order; of the variable's shape, float64 or float32. A slot has
            only the variables for which the optimizer keeps something.
    """

    def __init__(self, manifest: Manifest, outer: OuterOptimizer) -> None:
        self.arrays: dict[str, dict[str, Values]] = {}
        self._manifest = manifest
        self._pieces: list[list[Slots]] = []
        by_variable = list[dict[str, Values]]()
        for variable in manifest.variables:
            dtype = DTYPES[variable.dtype]
            slots = {slot: np.zeros(variable.shape, summed_in(dtype)) for slot in slots_of(outer, dtype)}
            for slot, array in slots.items():
                self.arrays.setdefault(slot, {})[variable.name] = array
            by_variable.append({slot: array.reshape(-1) for slot, array in slots.items()})
        if self.arrays:
            self._pieces = [
                [
                    {s: array[p.start : p.start + p.count] for s, array in by_variable[p.variable].items()}
                    for p in pieces
                ]
                for pieces in manifest.pieces
            ]

    @staticmethod
    def memory_bytes(manifest: Manifest, outer: OuterOptimizer) -> int:
        """The size of the arrays."""
        return sum(
            variable.size * summed_in(DTYPES[variable.dtype]).itemsize * len(slots_of(outer, DTYPES[variable.dtype]))
            for variable in manifest.variables
        )

    def pieces(self, index: int) -> Sequence[Slots]:
        """The state of each piece of fragment ``index``; views."""
        return self._pieces[index] if self._pieces else [_NOTHING] * len(self._manifest.pieces[index])

    def load(self, arrays: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> None:
        """Copies arrays of the same names, shapes and dtypes into the state."""
        for slot, by_variable in self.arrays.items():
            for name, array in by_variable.items():
                array[...] = arrays[slot][name]
