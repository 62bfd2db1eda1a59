"""Fragments whose variables all have one element type: summed and divided as one array, however many variables they
have. With 333 variables in a fragment, variable by variable takes four times as long."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, Manifest

__all__ = ["Uniform", "uniform_fragments"]


@dataclass(frozen=True)
class Uniform:
    """A fragment of one element type.

    Args:
        dtype: the type.
        start, end: its first byte and its end in the flat buffer.
        variables: the indexes of its variables.
        padding: which of its elements are padding; anything may arrive there.
    """

    dtype: np.dtype[np.generic]
    start: int
    end: int
    variables: range
    padding: NDArray[np.intp]

    def of(self, flat: NDArray[np.uint8]) -> NDArray[np.generic]:
        """The fragment in a flat buffer; a view."""
        return flat[self.start : self.end].view(self.dtype)

    def has(self, variables: Collection[int]) -> bool:
        """Whether one of these variables is in it."""
        return bool(variables) and any(number in variables for number in self.variables)


def uniform_fragments(manifest: Manifest) -> list[Uniform | None]:
    """For every fragment, how it is one array; None: its variables have different types."""
    return [_uniform(manifest, index) for index in range(manifest.fragment_count)]


def _uniform(manifest: Manifest, index: int) -> Uniform | None:
    pieces = manifest.pieces[index]
    dtypes = {DTYPES[manifest.variables[piece.variable].dtype] for piece in pieces}
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    start, end = manifest.fragment_bounds(index)
    is_padding = np.ones((end - start) // dtype.itemsize, np.bool_)
    for piece in pieces:
        first = piece.offset_bytes // dtype.itemsize
        is_padding[first : first + piece.count] = False
    variables = range(pieces[0].variable, pieces[-1].variable + 1)
    return Uniform(dtype, start, end, variables, np.flatnonzero(is_padding))
