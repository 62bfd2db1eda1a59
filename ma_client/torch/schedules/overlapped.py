"""Rounds at every interval while training goes on: a snapshot is pushed in the background, and the average is installed
under what was trained meanwhile.

The worker goes on from the new center plus its own steps since the snapshot, as with hivemind's `delta_rule_averaging`.
Streaming DiLoCo (Douillard et al., arXiv:2501.18512) and torchft's local SGD delay averages in the same way, but then
mix center and local variables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ma_client.job.ticket import PushTicket
from ma_client.torch.rounds import OwnContribution, Rounds

__all__ = ["Overlapped"]


@dataclass(frozen=True)
class _UnderWay:
    """A round under way.

    Args:
        ticket: its push.
        contribution: what was pushed.
    """

    ticket: PushTicket
    contribution: OwnContribution


class Overlapped:
    """A round begins whenever ``interval_steps`` divides `local_step`. Its average is installed after the first step at
    which it is there, at the latest after ``overlap_steps`` steps: then training waits for it.

    Args:
        rounds: the parts of a round.
        interval_steps: local steps between the beginnings of two rounds, from 1.
        overlap_steps: from 1 to ``interval_steps``.
    """

    def __init__(self, rounds: Rounds, interval_steps: int, overlap_steps: int) -> None:
        self._rounds = rounds
        self._interval_steps = interval_steps
        self._overlap_steps = overlap_steps
        self._under_way: _UnderWay | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a round has begun and its average is not installed."""
        return self._under_way is not None

    def has_work(self, local_step: int) -> bool:
        """Whether a round is due or under way."""
        return self.is_under_way or local_step % self._interval_steps == 0

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """Installs an average that is there or overdue; begins a round if one is due."""
        under_way, is_due = self._under_way, local_step % self._interval_steps == 0
        if is_due:
            self._rounds.note_loss(loss)
        if under_way is not None:
            steps = local_step - under_way.contribution.local_step
            if is_due or under_way.ticket.done or steps >= self._overlap_steps:
                self.wait()
        if is_due:
            contribution = self._rounds.gather(snapshot=True)
            self._under_way = _UnderWay(self._rounds.begin_push(contribution), contribution)

    def average(self) -> None:
        """Ends the round that is under way, then makes a whole one."""
        self.wait()
        contribution = self._rounds.gather()
        self._rounds.install(self._rounds.push(contribution), contribution)

    def wait(self) -> None:
        """Ends the round that is under way; if it failed, the local variables are as they were."""
        under_way = self._under_way
        if under_way is None:
            return
        try:
            result = under_way.ticket.result()
        except Exception:
            self._under_way = None
            raise
        self._under_way = None
        self._rounds.install_under(result, under_way.contribution)
