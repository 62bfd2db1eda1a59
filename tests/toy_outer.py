"""A toy outer optimizer: heavy-ball momentum; an example of an added one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelaverage.outer.base import OuterOptimizer, Slots, Values

__all__ = ["ToyMomentum", "ToyWithoutMaster"]


@dataclass(frozen=True)
class ToyMomentum(OuterOptimizer):
    """``b := momentum * b + (center - average)``; ``center := center - lr * b``."""

    lr: float = 0.5
    momentum: float = 0.75

    name: ClassVar[str] = "toy"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("velocity",)

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:  # noqa: ARG002
        velocity = self.momentum * state["velocity"] + (center - average)
        return center - self.lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class ToyWithoutMaster(ToyMomentum):
    """The same, which starts every step from the rounded center of a 16-bit variable."""

    name: ClassVar[str] = "toy-without-master"
    has_master: ClassVar[bool] = False
