"""What an optimizer asks of a schedule."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Schedule"]


class Schedule(Protocol):
    """Makes one worker's rounds out of the parts in `Rounds`."""

    @property
    def is_under_way(self) -> bool:
        """Whether a round has begun and its average is not installed."""

    def has_work(self, local_step: int) -> bool:
        """Whether `after_step` has something to do after this step: a round is due, or one is under way."""

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """Called after every local step: makes the round that is due now, or goes on with one that is under way.

        Args:
            local_step: this worker's count of steps, with this one.
            loss: what the closure of this step returned.

        Raises:
            ModelAverageError: the round failed. The step stands; the local variables are what it made them.
        """

    def average(self) -> None:
        """Makes a whole round now and returns when the average is installed.

        Raises:
            ModelAverageError: the round failed; the local variables are untouched.
        """

    def wait(self) -> None:
        """Ends the round that is under way, if there is one: afterwards its center is installed.

        Called before the state of training is saved, restored, replaced by the center, or ended.

        Raises:
            ModelAverageError: that round failed.
        """
