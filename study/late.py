"""What a worker does with a center that arrives some steps after its push: the rules, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_client.torch.rounds import moved

__all__ = ["LATE_RULES", "LateRule"]

Array = NDArray[Any]
LateRule = Callable[[Array, Array, Array], Array]
"""New local values from the center that arrived, what was pushed, and the local values now; all of one shape."""


def drop(center: Array, pushed: Array, now: Array) -> Array:  # noqa: ARG001
    """The center. What was trained since the push is lost."""
    return center


def mix(center: Array, pushed: Array, now: Array) -> Array:  # noqa: ARG001
    """Half the center, half the local values: Streaming DiLoCo (arXiv:2501.18512) with a mixing factor of 0.5."""
    mixed: Array = (center + now) * np.float32(0.5)
    return mixed


LATE_RULES: dict[str, LateRule] = {"keep": moved, "drop": drop, "mix": mix}
"""``keep`` is the optimizer's own: the center plus what was trained since the push."""
