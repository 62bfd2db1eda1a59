"""What a way to train with several workers is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from study.server import Variables

__all__ = ["Method"]


class Method(ABC):
    """A training in progress.

    Attributes:
        rounds: done so far.
        pushes: of all workers, that counted so far.
        up_bytes: values that a worker has sent so far, mean of all workers.
        down_bytes: values that it has got so far, without the first center.
    """

    rounds: int = 0
    pushes: int = 0
    up_bytes: int = 0
    down_bytes: int = 0

    @abstractmethod
    def step(self, steps_done: int) -> list[float]:
        """The next step of every worker that trains; returns their losses before it. ``steps_done`` from 0 on."""

    @property
    @abstractmethod
    def center(self) -> Variables:
        """The result of the training so far; valid until the next step."""
