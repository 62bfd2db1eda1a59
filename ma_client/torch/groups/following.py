"""The training of a worker that is a group, in a rank other than 0: it follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ma_client.job.results import PushResult
from ma_client.session import ParameterServerSession
from ma_client.torch.groups.calls import GroupDone, GroupFailed, Standing
from ma_client.torch.training.parts import WorkerParts
from modelaverage.errors import ConflictError

__all__ = ["FollowingTraining"]


class FollowingTraining:
    """See `WorkerTraining`.

    Args:
        follow: does what rank 0 calls for; see `Follower.follow`.
        rank: in the group.
        parts: of the worker, in this rank.
        standing: where the worker is.

    Attributes:
        loss: has no effect: rank 0 says the loss.
    """

    def __init__(
        self, follow: Callable[[], GroupDone | GroupFailed], rank: int, parts: WorkerParts, standing: Standing
    ) -> None:
        self._do = follow
        self._rank = rank
        self._parts = parts
        self._standing = standing
        self.loss: float | None = None

    @property
    def session(self) -> ParameterServerSession:
        """Raises ValueError: rank 0 has it."""
        raise ValueError(f"rank {self._rank} of the worker group has no session: rank 0 talks to the servers")

    @property
    def has_begun(self) -> bool:
        """See `WorkerTraining`."""
        return self._standing.has_begun

    @property
    def global_step(self) -> int:
        """See `WorkerTraining`."""
        return self._standing.global_step

    @property
    def base_step(self) -> int | None:
        """See `WorkerTraining`."""
        return self._standing.base_step

    @base_step.setter
    def base_step(self, base_step: int) -> None:
        self._standing = replace(self._standing, base_step=base_step)

    @property
    def last_round(self) -> PushResult | None:
        """See `WorkerTraining`; without the center."""
        return self._standing.last_round

    def begin(self) -> None:
        """See `WorkerTraining`."""
        self._follow()

    def initialize_center(self) -> None:
        """See `WorkerTraining`."""
        self._follow()

    def start_from_center(self) -> None:
        """See `WorkerTraining`."""
        self._follow()

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:  # noqa: ARG002
        """See `WorkerTraining`."""
        if local_step % self._parts.settings.interval_steps == 0 or self._standing.is_under_way:
            self._follow()

    def average(self) -> None:
        """See `WorkerTraining`."""
        self._follow()

    def wait(self) -> None:
        """See `WorkerTraining`."""
        if self._standing.is_under_way:
            self._follow()

    def wait_to_save(self) -> None:
        """See `WorkerTraining`. Trainers save an optimizer in rank 0 alone."""

    def finish(self, final_round: bool, wait_for_others_s: float) -> None:  # noqa: ARG002
        """See `WorkerTraining`."""
        self._follow()

    def close(self) -> None:
        """Does nothing: there is no session here."""

    def _follow(self) -> None:
        said = self._do()
        if said.standing is not None:
            self._stand(said.standing)
        if isinstance(said, GroupFailed):
            raise said.error

    def _stand(self, standing: Standing) -> None:
        own, leaders = self._parts.progress.local_step, standing.progress["local_step"]
        if own != leaders:
            raise ConflictError(
                f"rank {self._rank} of the worker group has made {own} local steps and rank 0 {leaders}: the ranks of "
                "a group make their steps together"
            )
        self._parts.progress.load(standing.progress, self._parts.settings.interval_steps)
        if standing.global_step != self._standing.global_step:
            self._parts.shown.show(standing.global_step)
        self._standing = standing
