"""Synchronous training: every step takes the mean of all workers' gradients, as DistributedDataParallel does."""

from __future__ import annotations

from study.arm import Arm
from study.methods.base import Method
from study.server import Variables
from study.tasks.base import LearningTask
from study.worker import PlayedWorker

__all__ = ["SynchronousMethod"]


class SynchronousMethod(Method):
    """One model, since all workers have the same; every step takes the mean gradient of one batch of each worker.

    Bytes: in every step each worker sends its gradient and gets the mean, both in the model's size. A ring of N workers
    carries 2 (N - 1) / N times this size in each direction: as much with 2 workers, 1.5 times as much with 4.
    """

    def __init__(self, task: LearningTask, arm: Arm) -> None:
        self._worker = PlayedWorker(task, arm, range(arm.num_workers))
        self._num_workers = arm.num_workers
        self._gradient_bytes = sum(values.nbytes for values in self._worker.variables.values())

    def step(self, steps_done: int) -> list[float]:
        """A step of the one model."""
        loss = self._worker.step(steps_done)
        self.rounds += 1
        self.pushes += self._num_workers
        self.up_bytes += self._gradient_bytes
        self.down_bytes += self._gradient_bytes
        return [loss]

    @property
    def center(self) -> Variables:
        """The model."""
        return self._worker.variables
