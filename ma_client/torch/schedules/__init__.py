"""Schedules: when a worker's rounds are due, and whether training stands still meanwhile.

To add one, write it in a file of its own (see `base.Schedule`) and choose it in `schedule_for`.
"""

from __future__ import annotations

from ma_client.torch.rounds import Rounds
from ma_client.torch.schedules.base import Schedule
from ma_client.torch.schedules.blocking import Blocking
from ma_client.torch.schedules.overlapped import Overlapped
from ma_client.torch.settings import OptimizerSettings

__all__ = ["Schedule", "schedule_for"]


def schedule_for(settings: OptimizerSettings, rounds: Rounds) -> Schedule:
    """The schedule that an optimizer's settings ask for."""
    if settings.overlap_steps:
        return Overlapped(rounds, settings.interval_steps, settings.overlap_steps)
    return Blocking(rounds, settings.interval_steps)
