"""The outer optimizer `sgd`: a step of SGD with momentum, whose gradient is how far the workers have moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from modelaverage.outer.base import OuterOptimizer, Slots, Values, check_setting

__all__ = ["OuterSGD"]

_MOMENTUM = "momentum"


@dataclass(frozen=True)
class OuterSGD(OuterOptimizer):
    """SGD over rounds, with the formulas of `torch.optim.SGD` (no dampening, no weight decay)::

        g := center - average
        b := momentum * b + g                       b begins as zeros
        center := center - lr * (g + momentum * b)  with nesterov
        center := center - lr * b                   without

    The settings of published methods:

    ====================================================== =====================================================
    DiLoCo (Douillard et al., arXiv:2311.08105)            ``OuterSGD(lr=0.7, momentum=0.9, nesterov=True)``
    SlowMo (Wang et al., arXiv:1910.00643), constant inner ``OuterSGD(lr=1.0, momentum=0.5)``; its alpha is ``lr``,
    learning rate                                          its beta (0.4 to 0.8) is ``momentum``
    BMUF, classical block momentum (Chen and Huo 2016)     ``OuterSGD(lr=1.0, momentum=1 - 1/N)`` for N workers
    BMUF, Nesterov block momentum                          the same with ``nesterov=True``
    FedAvgM (Hsu et al., arXiv:1909.06335)                 ``OuterSGD(lr=1.0, momentum=0.9)``
    LookAhead (Zhang et al., arXiv:1907.08610)             ``OuterSGD(lr=0.5)`` with one worker, 5 steps between
                                                           rounds
    ====================================================== =====================================================

    Args:
        lr: the outer learning rate: the factor for what the workers have moved. Above 0. It has no unit, and it does
            not follow the schedule of the workers' own learning rate.
        momentum: from 0 to less than 1. With 0 there is no state.
        nesterov: look ahead along the momentum; needs one.

    Raises:
        ValueError: a setting is out of range.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    name: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "lr", self.lr, self.lr > 0, "a number above 0")
        check_setting(self, "momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to less than 1")
        check_setting(self, "nesterov", self.nesterov, self.momentum > 0 or not self.nesterov, "False without momentum")

    @property
    def slots(self) -> tuple[str, ...]:
        """``momentum``, unless it is 0."""
        return (_MOMENTUM,) if self.momentum else ()

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
        moved = center - average
        if not self.momentum:
            np.multiply(moved, self.lr, out=into)
        else:
            momentum = into_slots[_MOMENTUM]
            np.multiply(state[_MOMENTUM], self.momentum, out=momentum)
            momentum += moved
            if self.nesterov:
                np.multiply(momentum, self.momentum, out=into)
                into += moved
                into *= self.lr
            else:
                np.multiply(momentum, self.lr, out=into)
        np.subtract(center, into, out=into)
