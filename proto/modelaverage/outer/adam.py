"""The outer optimizer `adam`: a step of Adam, whose gradient is how far the workers have moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from modelaverage.outer.base import OuterOptimizer, Slots, Values, check_setting

__all__ = ["OuterAdam"]


@dataclass(frozen=True)
class OuterAdam(OuterOptimizer):
    """FedAdam (Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, algorithm 2)::

        d := average - center
        m := beta1 * m + (1 - beta1) * d            m and v begin as zeros
        v := beta2 * v + (1 - beta2) * d * d
        center := center + lr * m / (sqrt(v) + eps)

    As in the paper there is no bias correction; `torch.optim.Adam` has one. ``eps`` is what adapts least: it is of the
    size of ``d``, so it is far larger than torch's 1e-8.

    Args:
        lr: the outer learning rate, in the unit of the variables: no element moves much farther than this in a round.
            Above 0; the paper's best settings are from 0.01 to 0.1.
        betas: how much of ``m`` and of ``v`` stays; each from 0 to less than 1.
        eps: the paper's tau, in the unit of the variables; above 0.

    Raises:
        ValueError: a setting is out of range.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3

    name: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "lr", self.lr, self.lr > 0, "a number above 0")
        are_right = all(0 <= beta < 1 for beta in self.betas)
        check_setting(self, "betas", self.betas, are_right, "two numbers from 0 to less than 1")
        check_setting(self, "eps", self.eps, self.eps > 0, "a number above 0")

    @property
    def slots(self) -> tuple[str, ...]:
        """``m`` and ``v``."""
        return ("m", "v")

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:
        """The formulas above."""
        return self._updated(center, average, state, step)

    def update_into(
        self,
        center: Values,
        average: Values,
        state: Slots,
        step: int,  # noqa: ARG002
        into: Values,
        into_slots: Slots,
    ) -> None:
        """The same, with as few passes over memory as NumPy allows."""
        (beta1, beta2), m, v = self.betas, into_slots["m"], into_slots["v"]
        moved = average - center
        np.multiply(state["m"], beta1, out=m)
        np.multiply(moved, 1 - beta1, out=into)
        m += into
        np.multiply(state["v"], beta2, out=v)
        moved *= moved
        moved *= 1 - beta2
        v += moved
        root = np.sqrt(v, out=moved)
        root += self.eps
        np.divide(m, root, out=into)
        into *= self.lr
        into += center
