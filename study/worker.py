"""A worker of a played job: its model, inner optimizer and batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from study.arm import Arm
from study.late import LATE_RULES
from study.server import Variables
from study.tasks.base import LearningTask, mean_loss_of

__all__ = ["PlayedWorker", "install"]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""How optimizers of torch call it."""


class PlayedWorker:
    """One model that is trained on one thread.

    Args:
        task: gives model, optimizer and batches.
        arm: the training.
        shares: indexes of the workers whose batches it trains on: its own, or those of several, whose mean gradient it
            then takes in every step.

    Attributes:
        variables: the model's memory.
    """

    def __init__(self, task: LearningTask, arm: Arm, shares: Sequence[int]) -> None:
        self.model = task.model(arm.seed)
        self.variables: Variables = {n: p.detach().numpy() for n, p in self.model.named_parameters()}
        self._task, self._arm = task, arm
        self._optimizer = task.optimizer(self.model, arm.learning_rate)
        shards = arm.variation.shards
        self._batches = [task.batches(arm.seed, index, arm.num_workers, shards) for index in shares]

    def step(self, steps_done: int) -> float:
        """One local step; returns the mean loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._arm.learning_rate * self._task.rate_factor(steps_done / self._arm.steps)
        self._optimizer.zero_grad()
        losses = list[float]()
        for batches in self._batches:
            loss = mean_loss_of(self.model, next(batches))
            (loss / len(self._batches)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        self._optimizer.step()
        return float(np.mean(losses))

    def copy(self) -> Variables:
        """The variables as they are now."""
        return {name: values.copy() for name, values in self.variables.items()}

    def install(self, center: Variables, pushed: Variables) -> None:
        """Does with a center what the arm says, and with the first moment of the inner optimizer, too."""
        rule = LATE_RULES[self._arm.late_rule]
        for name, values in self.variables.items():
            values[...] = rule(center[name], pushed[name], values)
        factor = self._arm.variation.first_moment
        if factor != 1.0:
            for state in self._optimizer.state.values():
                for moment in _FIRST_MOMENTS:
                    if state.get(moment) is not None:
                        state[moment].mul_(factor)

    def restart(self, center: Variables) -> None:
        """The worker comes back in a new process: the center and a new inner optimizer. Its batches go on."""
        install(center, self.variables)
        self._optimizer = self._task.optimizer(self.model, self._arm.learning_rate)


def install(center: Variables, into: Variables) -> None:
    """Copies all values."""
    for name, values in into.items():
        values[...] = center[name]
