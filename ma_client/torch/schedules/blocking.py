"""Rounds at every interval, for which training stands still: push, wait at the barrier, install."""

from __future__ import annotations

import torch

from ma_client.torch.rounds import Rounds

__all__ = ["Blocking"]


class Blocking:
    """A round whenever ``interval_steps`` divides `local_step`, as in TensorFlow 1.15.

    Args:
        rounds: the parts of a round.
        interval_steps: local steps between two rounds, from 1.
    """

    def __init__(self, rounds: Rounds, interval_steps: int) -> None:
        self._rounds = rounds
        self._interval_steps = interval_steps

    @property
    def is_under_way(self) -> bool:
        """False: a round ends within the call that began it."""
        return False

    def has_work(self, local_step: int) -> bool:
        """Whether a round is due."""
        return local_step % self._interval_steps == 0

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """Makes a round if one is due."""
        if self.has_work(local_step):
            self._rounds.note_loss(loss)
            self.average()

    def average(self) -> None:
        """Makes a round."""
        contribution = self._rounds.gather()
        self._rounds.install(self._rounds.push(contribution), contribution)

    def wait(self) -> None:
        """Does nothing: no round is under way."""
