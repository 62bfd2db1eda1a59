"""The training of a worker that is a group, as its rank 0 makes it: the training of one process, led."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ma_client.job.results import PushResult
from ma_client.session import ParameterServerSession
from ma_client.torch.groups.calls import GroupDone, Standing
from ma_client.torch.progress import Progress
from ma_client.torch.training.solo import SoloTraining

__all__ = ["LedTraining"]

_Lead = Callable[[Callable[[], Any], Callable[[Any], GroupDone], Callable[[], Standing]], Any]


class LedTraining:
    """See `WorkerTraining`.

    Args:
        own: makes the worker's rounds.
        progress: the worker's.
        lead: does something with the other ranks; see `Leader.lead`.
        compare: warns if their models differ; called before the first round.
    """

    def __init__(self, own: SoloTraining, progress: Progress, lead: _Lead, compare: Callable[[], None]) -> None:
        self._own = own
        self._progress = progress
        self._do = lead
        self._compare = compare

    def standing(self) -> Standing:
        """Where the worker is."""
        last = self._own.last_round
        return Standing(
            global_step=self.global_step,
            base_step=self.base_step,
            has_begun=self.has_begun,
            progress=self._progress.state(),
            is_under_way=self._own.schedule.is_under_way,
            last_round=None if last is None else replace(last, center={}),
        )

    @property
    def loss(self) -> float | None:
        """See `WorkerTraining`."""
        return self._own.loss

    @loss.setter
    def loss(self, loss: float | None) -> None:
        self._own.loss = loss

    @property
    def session(self) -> ParameterServerSession:
        """See `WorkerTraining`."""
        return self._own.session

    @property
    def has_begun(self) -> bool:
        """See `WorkerTraining`."""
        return self._own.has_begun

    @property
    def global_step(self) -> int:
        """See `WorkerTraining`."""
        return self._own.global_step

    @property
    def base_step(self) -> int | None:
        """See `WorkerTraining`."""
        return self._own.base_step

    @base_step.setter
    def base_step(self, base_step: int) -> None:
        self._own.base_step = base_step

    @property
    def last_round(self) -> PushResult | None:
        """See `WorkerTraining`."""
        return self._own.last_round

    def begin(self) -> None:
        """See `WorkerTraining`."""
        self._lead(self._own.begin)

    def initialize_center(self) -> None:
        """See `WorkerTraining`."""
        self._lead(self._own.initialize_center)

    def start_from_center(self) -> None:
        """See `WorkerTraining`."""
        self._lead(self._own.start_from_center)

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """See `WorkerTraining`."""
        if self._own.schedule.has_work(local_step):
            self._lead(lambda: self._round(lambda: self._own.after_step(local_step, loss)))

    def average(self) -> None:
        """See `WorkerTraining`."""
        self._lead(lambda: self._round(self._own.average))

    def wait(self) -> None:
        """See `WorkerTraining`."""
        if self._own.schedule.is_under_way:
            self._lead(self._own.wait)

    def wait_to_save(self) -> None:
        """See `WorkerTraining`. Trainers save an optimizer in rank 0 alone, which cannot end a round."""

    def finish(self, final_round: bool, wait_for_others_s: float) -> None:
        """See `WorkerTraining`."""
        self._lead(lambda: self._own.finish(final_round, wait_for_others_s))

    def close(self) -> None:
        """See `WorkerTraining`."""
        self._own.close()

    def _round(self, work: Callable[[], None]) -> None:
        if self.last_round is None and not self._own.schedule.is_under_way:
            self._compare()
        work()

    def _lead(self, work: Callable[[], None]) -> None:
        self._do(work, lambda _: GroupDone(self.standing()), self.standing)
