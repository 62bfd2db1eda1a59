"""A toy outer optimizer: heavy-ball momentum; an example of an added one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ps_server.center.outer.base import Setting, Slots, Values

__all__ = ["ToyMomentum"]


@dataclass(frozen=True)
class ToyMomentum:
    """``b := momentum * b + (center - average)``; ``center := center - lr * b``."""

    lr: float = 0.5
    momentum: float = 0.75
    has_master: bool = True

    @property
    def name(self) -> str:
        return "toy"

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {"lr": self.lr, "momentum": self.momentum, "has_master": self.has_master}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("velocity",)

    def init(self, center: Values) -> Slots:
        return {"velocity": np.zeros_like(center)}

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:  # noqa: ARG002
        velocity = self.momentum * state["velocity"] + (center - average)
        return center - self.lr * velocity, {"velocity": velocity}
