"""One worker alone with its share of the data: what the others are worth."""

from __future__ import annotations

from study.arm import Arm
from study.methods.base import Method
from study.server import Variables
from study.tasks.base import LearningTask
from study.worker import PlayedWorker

__all__ = ["AloneMethod"]


class AloneMethod(Method):
    """Worker 0 of a job; the others and the server do nothing, and no bytes are sent."""

    def __init__(self, task: LearningTask, arm: Arm) -> None:
        self._worker = PlayedWorker(task, arm, [0])

    def step(self, steps_done: int) -> list[float]:
        """A local step."""
        return [self._worker.step(steps_done)]

    @property
    def center(self) -> Variables:
        """The worker's variables."""
        return self._worker.variables
