"""A worker's local variables beside the center: pull, install, and what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_client.session import ParameterServerSession
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.progress import Progress
from ma_client.torch.session_holder import SessionHolder
from modelaverage.chosen import NOTHING_CHOSEN, Chosen

__all__ = ["Replica"]


class Replica:
    """One worker's copy of the center, and how far it was trained since.

    Args:
        holder: of the session.
        variables: the local variables.
        progress: counts steps, and starts again with every center that is installed.
        num_worker: how many workers a round has to wait for.
        when_installed: called with `global_step` after each install.
        chosen: what the job must have; empty: anything.
    """

    def __init__(
        self,
        holder: SessionHolder,
        variables: LocalVariables,
        progress: Progress,
        num_worker: int,
        when_installed: Callable[[int], None],
        chosen: Chosen = NOTHING_CHOSEN,
    ) -> None:
        self.holder = holder
        self.variables = variables
        self.progress = progress
        self._num_worker = num_worker
        self._when_installed = when_installed
        self.chosen = chosen

    @property
    def session(self) -> ParameterServerSession:
        """The present session."""
        return self.holder.session

    def pull(self) -> None:
        """Replaces the local variables by the center; waits for the chief if there is none.

        Raises:
            ValueError: the server averages another number of workers than ``num_worker``.
            ModelAverageError: see `ParameterServerSession.pull`.
        """
        center, _ = self.session.pull(
            expected=self.variables.gather(),
            copy=False,
            outer_optimizer=self.chosen.outer_optimizer or None,
            compression=self.chosen.compression or None,
        )
        if self.session.num_workers != self._num_worker:
            raise ValueError(
                f"num_worker is {self._num_worker}, but the server was started with --num-workers "
                f"{self.session.num_workers}"
            )
        self.install(center)

    def install(self, center: Mapping[str, Any], kept: Collection[str] = (), steps_later: int = 0) -> None:
        """Replaces the local variables by this center.

        Args:
            center: by name.
            kept: names of the variables that are left as they are, because they are equal to the center already.
            steps_later: how many local steps are in ``center`` that no round has had.
        """
        self.variables.install(center, kept)
        self.progress.center_installed(steps_later)
        self._when_installed(self.holder.global_step)

    def untouched(self, local: Mapping[str, NDArray[np.generic]]) -> frozenset[str]:
        """Names of the variables that hold the bytes that were installed.

        Bytes are compared because a variable that saw no gradient may have changed all the same: its gradient was
        freed during the step, or something else than the optimizer changed it.
        """
        touched = self.progress.touched
        return self.session.unchanged({name: array for name, array in local.items() if name not in touched})

    def has_something_to_average(self) -> bool:
        """Whether there were steps since the last round, or parameters have changed without a step."""
        if self.progress.steps_since_round > 0:
            return True
        # A changed buffer alone is no training: an evaluation may have moved its statistics.
        local = self.variables.gather_parameters()
        return self.session.unchanged(local) != local.keys()
