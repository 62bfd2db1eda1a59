"""Outer optimizers as their formulas say, on whole variables, for comparison bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.outer import OuterAdam, OuterOptimizer, OuterSGD
from tests.toy_outer import ToyMomentum

__all__ = ["OUTERS", "formula"]

OUTERS: tuple[OuterOptimizer, ...] = (
    ToyMomentum(),
    OuterSGD(0.75),
    OuterSGD(1.0, 0.5),
    OuterSGD(0.7, 0.9, nesterov=True),
    OuterAdam(0.1),
)

_Array = NDArray[Any]


def formula(
    outer: OuterOptimizer, center: _Array, average: _Array, state: dict[str, _Array]
) -> tuple[_Array, dict[str, _Array]]:
    """The next center and state, of the dtype of ``center``."""
    number = center.dtype.type
    if isinstance(outer, ToyMomentum):
        velocity = number(outer.momentum) * state["velocity"] + (center - average)
        return center - number(outer.lr) * velocity, {"velocity": velocity}
    if isinstance(outer, OuterSGD):
        gradient = center - average
        if not outer.momentum:
            return center - number(outer.lr) * gradient, {}
        momentum = number(outer.momentum) * state["momentum"] + gradient
        direction = gradient + number(outer.momentum) * momentum if outer.nesterov else momentum
        return center - number(outer.lr) * direction, {"momentum": momentum}
    assert isinstance(outer, OuterAdam)
    delta = average - center
    first, second = (number(beta) for beta in outer.betas)
    rest = number(1 - outer.betas[0]), number(1 - outer.betas[1])
    m = first * state["m"] + rest[0] * delta
    v = second * state["v"] + rest[1] * (delta * delta)
    return center + number(outer.lr) * (m / (np.sqrt(v) + number(outer.eps))), {"m": m, "v": v}
