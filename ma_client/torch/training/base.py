"""What an optimizer asks of its training."""

from __future__ import annotations

from typing import Protocol

import torch

from ma_client.job.results import PushResult
from ma_client.session import ParameterServerSession

__all__ = ["WorkerTraining"]


class WorkerTraining(Protocol):
    """One process' part in a worker's training: all of it, or that of one rank of a group.

    Errors are those of `ModelAverageOptimizer`'s methods of the same names.

    Attributes:
        loss: what the next pushes say of the loss.
    """

    loss: float | None

    @property
    def session(self) -> ParameterServerSession:
        """The connection to the servers. Raises ValueError in a process that has none."""

    @property
    def has_begun(self) -> bool:
        """Whether this worker has had a center."""

    @property
    def global_step(self) -> int:
        """Rounds completed, as far as this worker knows."""

    @property
    def base_step(self) -> int | None:
        """The `global_step` of the center that this worker has; None: it has none. May be set, to that of an earlier
        center that was restored."""

    @base_step.setter
    def base_step(self, base_step: int) -> None: ...

    @property
    def last_round(self) -> PushResult | None:
        """How the last push ended; None: there was none."""

    def begin(self) -> None:
        """The start."""

    def initialize_center(self) -> None:
        """The chief sets the center, unless it was set before."""

    def start_from_center(self) -> None:
        """Replaces the local variables by the center; warns if steps are lost by that."""

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """See `Schedule.after_step`."""

    def average(self) -> None:
        """One round now."""

    def wait(self) -> None:
        """Ends the round that is under way."""

    def wait_to_save(self) -> None:
        """Ends the round that is under way, if this process alone can: its state is about to be saved."""

    def finish(self, final_round: bool, wait_for_others_s: float) -> None:
        """The end, with a last round if something was trained since the last one."""

    def close(self) -> None:
        """Closes the session if this object made it."""
