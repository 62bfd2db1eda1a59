"""The outer optimizer `average`: the average is the next center, as in TensorFlow 1.15. It costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelaverage.outer.base import OuterOptimizer, Slots, Values

__all__ = ["OuterAverage"]


@dataclass(frozen=True)
class OuterAverage(OuterOptimizer):
    """The plain average: no settings, no state. The default.

    Algorithm: ``center := average``, as ``tf.contrib.opt.ModelAverageOptimizer`` of TensorFlow 1.15; FedAvg (McMahan et
    al., arXiv:1602.05629) with equal weights.
    """

    name: ClassVar[str] = "average"
    has_master: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[str, ...]:
        """None."""
        return ()

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:  # noqa: ARG002
        """``average`` itself."""
        return average, state
