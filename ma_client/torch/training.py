"""Begin and end of training: the chief sets the center, every worker starts from it, and says when it has finished."""

from __future__ import annotations

from ma_client.torch.gradient_sync import warn_if_gradients_are_shared
from ma_client.torch.habits import not_compiled
from ma_client.torch.replica import Replica
from ma_client.torch.schedules import Schedule
from ma_client.torch.steps_said import say_discarded, say_finished

__all__ = ["Training"]


class Training:
    """One worker's training.

    Args:
        replica: its local variables and their session.
        schedule: makes its rounds.
        is_chief: whether it initializes the center.
    """

    def __init__(self, replica: Replica, schedule: Schedule, is_chief: bool) -> None:
        self._replica = replica
        self._schedule = schedule
        self._is_chief = is_chief

    def begin(self) -> None:
        """See `ModelAverageOptimizer.begin`."""
        self._replica.holder.resume()
        self.initialize_center()
        self.start_from_center()

    def initialize_center(self) -> None:
        """See `ModelAverageOptimizer.initialize_center`."""
        variables, holder = self._replica.variables, self._replica.holder
        warn_if_gradients_are_shared(variables.getter.model)
        if not self._is_chief:
            return
        values, others = variables.gather(), variables.getter.other_names()
        done = holder.session.initialize(
            values,
            global_step=holder.global_step,
            other_names=others,
            outer_optimizer=self._replica.chosen.outer_optimizer or None,
            compression=self._replica.chosen.compression or None,
        )
        if done.initialized:  # the center has what was trained before
            self._replica.progress.steps_since_round = 0

    @not_compiled
    def start_from_center(self) -> None:
        """Replaces the local variables by the center; warns if steps are lost by that."""
        self._schedule.wait()
        steps = self._replica.progress.steps_since_round
        self._replica.pull()
        if steps > 0:
            say_discarded(self._replica.session, steps)

    def finish(self, final_round: bool, wait_for_others_s: float) -> None:
        """See `ModelAverageOptimizer.finish`."""
        self._schedule.wait()
        if final_round and self._replica.has_something_to_average():
            self._schedule.average()
        session, global_step = self._replica.session, self._replica.holder.global_step
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
