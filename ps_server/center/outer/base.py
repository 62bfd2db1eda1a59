"""What an outer optimizer is: what turns the center and the average of a round into the next center."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MASTER", "OuterOptimizer", "Setting", "Slots", "Values", "slots_of", "summed_in"]

Values = NDArray[Any]
"""float64, or float32, which also stands for 16-bit variables; one-dimensional: a piece of a variable."""
Slots = Mapping[str, Values]
"""State of one piece, by slot; each has the piece's shape and dtype."""
Setting = float | bool

MASTER = "master"
"""The slot that the center itself keeps for a 16-bit variable: what the outer optimizer made, before it was rounded."""


class OuterOptimizer(Protocol):
    """A pair of pure functions, `init` and `update`, over a piece of one variable.

    Both are element-wise, so any cut into pieces and shards gives the same bits. Neither writes into its arguments: a
    round may start over, and then nothing has changed. The center keeps what they return: twice, like the center
    itself, and the commit swaps the two; in checkpoints; in the account of memory.

    16-bit variables: with `has_master` the center keeps a float32 master of them. `update` gets the master as
    ``center`` and returns the next one; what is published is its rounding. An optimizer without one must not look at
    ``center``, which then is the 16-bit variable itself.
    """

    @property
    def name(self) -> str:
        """Its key in OUTER_OPTIMIZERS."""

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The keyword arguments that make an equal one."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of what it keeps for every element, such as ``momentum``; not `MASTER`. Empty: it has no state."""

    @property
    def has_master(self) -> bool:
        """Whether it needs the exact center of a 16-bit variable."""

    def init(self, center: Values) -> Slots:
        """The state with which a piece of a center begins, for every one of `slots`."""

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:
        """The next center and the next state.

        Args:
            center: the piece of the center that the round started from.
            average: of the local variables; not rounded to 16 bits.
            state: of the piece.
            step: the ``global_step`` that the round started from.

        Returns:
            The next center may be ``average`` itself, and slots may be those of ``state``: whatever is returned is
            copied.
        """


def summed_in(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype in which variables of ``dtype`` are summed and updated: their own, or float32 instead of 16 bits."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def slots_of(outer: OuterOptimizer, dtype: np.dtype[np.generic]) -> tuple[str, ...]:
    """What is kept for every element of a variable of ``dtype``."""
    return (*outer.slots, MASTER) if outer.has_master and dtype.itemsize == 2 else outer.slots
