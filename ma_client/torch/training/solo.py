"""The training of a worker: the chief sets the center, every worker starts from it, makes rounds, and says when it has
finished."""

from __future__ import annotations

import torch

from ma_client.job.results import PushResult
from ma_client.session import ParameterServerSession
from ma_client.torch.frozen import digests_of, warn_if_others
from ma_client.torch.habits import not_compiled
from ma_client.torch.replica import Replica
from ma_client.torch.rounds import Rounds
from ma_client.torch.schedules import Schedule
from ma_client.torch.steps_said import say_discarded, say_finished

__all__ = ["SoloTraining"]


class SoloTraining:
    """The training of a worker that is one process, or led by one. See `WorkerTraining` for what is not described here.

    Args:
        replica: its local variables and their session.
        rounds: the parts of its rounds.
        schedule: makes its rounds.
        is_chief: whether it initializes the center.
    """

    def __init__(self, replica: Replica, rounds: Rounds, schedule: Schedule, is_chief: bool) -> None:
        self._replica = replica
        self._rounds = rounds
        self.schedule = schedule
        self._is_chief = is_chief

    @property
    def loss(self) -> float | None:
        """See `WorkerTraining`."""
        return self._rounds.loss

    @loss.setter
    def loss(self, loss: float | None) -> None:
        self._rounds.loss = loss

    @property
    def session(self) -> ParameterServerSession:
        """See `WorkerTraining`."""
        return self._replica.session

    @property
    def has_begun(self) -> bool:
        """See `WorkerTraining`."""
        return self.session.num_workers is not None

    @property
    def global_step(self) -> int:
        """See `WorkerTraining`."""
        return self._replica.holder.global_step

    @property
    def base_step(self) -> int | None:
        """See `WorkerTraining`."""
        return self.session.base_step

    @base_step.setter
    def base_step(self, base_step: int) -> None:
        self.session.base_step = base_step

    @property
    def last_round(self) -> PushResult | None:
        """See `WorkerTraining`."""
        return self._rounds.last

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        """See `WorkerTraining`."""
        self.schedule.after_step(local_step, loss)

    def average(self) -> None:
        """See `WorkerTraining`."""
        self.schedule.average()

    def wait(self) -> None:
        """See `WorkerTraining`."""
        self.schedule.wait()

    def wait_to_save(self) -> None:
        """See `WorkerTraining`."""
        self.schedule.wait()

    def begin(self) -> None:
        """See `ModelAverageOptimizer.begin`."""
        self._replica.holder.resume()
        self.initialize_center()
        self.start_from_center()

    def initialize_center(self) -> None:
        """See `ModelAverageOptimizer.initialize_center`."""
        variables, holder = self._replica.variables, self._replica.holder
        variables.warn_if_gradients_are_shared()
        if not self._is_chief:
            return
        values, others = variables.gather(), variables.getter.other_names()
        done = holder.session.initialize(
            values,
            global_step=holder.global_step,
            other_names=others,
            outer_optimizer=self._replica.chosen.outer_optimizer or None,
            compression=self._replica.chosen.compression or None,
            frozen_digests=digests_of(variables.frozen()),
        )
        if done.initialized:  # the center has what was trained before
            self._replica.progress.steps_since_round = 0

    @not_compiled
    def start_from_center(self) -> None:
        """Replaces the local variables by the center; warns if steps are lost by that."""
        self.schedule.wait()
        steps = self._replica.progress.steps_since_round
        self._replica.pull()
        warn_if_others(self._replica.session, self._replica.variables.frozen())
        if steps > 0:
            say_discarded(self._replica.session, steps)

    def finish(self, final_round: bool, wait_for_others_s: float) -> None:
        """See `ModelAverageOptimizer.finish`."""
        self.schedule.wait()
        if final_round and self._replica.has_something_to_average():
            self.schedule.average()
        session, global_step = self.session, self.global_step
        workers_training = session.finish()
        if workers_training > 0 and wait_for_others_s <= 0:
            say_finished(session, workers_training)
        if wait_for_others_s > 0:
            session.wait_for_others(wait_for_others_s)
            if any(status.global_step > global_step for status in session.statuses()):
                self._replica.pull()

    def close(self) -> None:
        """See `ModelAverageOptimizer.close`."""
        self._replica.holder.close()
