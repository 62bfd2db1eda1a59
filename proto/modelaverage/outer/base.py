"""What an outer optimizer is: what turns the center and the average of a round into the next center."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["MASTER", "OuterOptimizer", "Setting", "Slots", "Values", "check_setting", "slots_of", "summed_in"]

Values = NDArray[Any]
"""float64, or float32, which also stands for 16-bit variables; one-dimensional: a piece of a variable."""
Slots = Mapping[str, Values]
"""State of one piece, by slot; each has the piece's shape and dtype."""
Setting = float | bool | tuple[float, ...]

MASTER = "master"
"""The slot that the center itself keeps for a 16-bit variable: what the outer optimizer made, before it was rounded."""


@dataclass(frozen=True)
class OuterOptimizer:
    """A pair of pure functions, `init` and `update`, over a piece of one variable. The dataclass fields of a subclass
    are its settings.

    Both functions are element-wise, so any cut into pieces and shards gives the same bits. Neither writes into its
    arguments: a round may start over, and then nothing has changed. The center keeps two states, one for each of its
    buffers, and the commit swaps both. States are in checkpoints and in the account of memory.

    16-bit variables: with `has_master` the center keeps a float32 master of them. `update` gets the master as
    ``center`` and returns the next one; what is published is its rounding. An optimizer without one must not look at
    ``center``, which then is the 16-bit variable itself.
    """

    name: ClassVar[str]
    """Its key in OUTER_OPTIMIZERS."""
    has_master: ClassVar[bool] = True
    """Whether it needs the exact center of a 16-bit variable."""

    def __post_init__(self) -> None:
        """Makes numbers Python's own, because NumPy's would widen float32 arrays.

        Raises:
            ValueError: a setting has another type.
        """
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _as_python(self, field.name, str(field.type)))

    @property
    def settings(self) -> dict[str, Setting]:
        """The keyword arguments that make an equal one."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of what it keeps for every element, such as ``momentum``; not `MASTER`. Empty: it has no state."""
        raise NotImplementedError

    def init(self, center: Values) -> Slots:
        """The state with which a piece of a center begins: zeros for every one of `slots`."""
        return {slot: np.zeros_like(center) for slot in self.slots}

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
        raise NotImplementedError

    def update_into(
        self, center: Values, average: Values, state: Slots, step: int, into: Values, into_slots: Slots
    ) -> None:
        """`update`, whose results are written to memory that is given; the same bits. Override it to save copies.

        Args:
            center, average, state, step: see `update`.
            into: for the next center; may be the memory of ``average``, otherwise it overlaps nothing. Of the dtype of
                ``average``, or of 16 bits if the variable is and there is no master.
            into_slots: for the next state; all of `slots`, and perhaps others.
        """
        made, slots = self.update(center, average, state, step)
        into[...] = made
        for slot in self.slots:
            into_slots[slot][...] = slots[slot]

    def _updated(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:
        """What `update_into` writes, in new memory: an `update` for those that override it."""
        into, slots = np.empty_like(average), {slot: np.empty_like(average) for slot in self.slots}
        self.update_into(center, average, state, step, into, slots)
        return into, slots


def check_setting(outer: OuterOptimizer, setting: str, value: object, is_right: bool, wanted: str) -> None:
    """Raises ValueError unless ``is_right``; ``wanted`` says what a right value is."""
    if not is_right:
        raise ValueError(f"{type(outer).__name__}: {setting} is {value!r}; it must be {wanted}")


def _as_python(outer: OuterOptimizer, setting: str, kind: str) -> Setting:
    """A setting of the type that its annotation names: bool, float, or a tuple of floats."""
    value: Any = getattr(outer, setting)
    if kind == "bool":
        check_setting(outer, setting, value, isinstance(value, bool | np.bool_), "True or False")
        return bool(value)
    if kind == "float":
        check_setting(outer, setting, value, _is_number(value), "a number")
        return float(value)
    count = kind.count("float")
    are_numbers = isinstance(value, tuple | list) and len(value) == count and all(map(_is_number, value))
    check_setting(outer, setting, value, are_numbers, f"{count} numbers")
    return tuple(float(each) for each in value)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def summed_in(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype in which variables of ``dtype`` are summed and updated: their own, or float32 instead of 16 bits."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def slots_of(outer: OuterOptimizer, dtype: np.dtype[np.generic]) -> tuple[str, ...]:
    """What is kept for every element of a variable of ``dtype``."""
    return (*outer.slots, MASTER) if outer.has_master and dtype.itemsize == 2 else outer.slots
