"""One training, played in one process: several workers with a share of the data each, and a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from modelaverage.codecs import codec_named
from modelaverage.outer import outer_optimizer
from study.late import LATE_RULES
from study.server import PlayedServer, Variables
from study.tasks.base import LearningTask, mean_loss_of

__all__ = ["Arm", "Measured", "play"]


@dataclass(frozen=True)
class Arm:
    """All that decides the result of a training.

    Args:
        task: a key of `study.tasks.TASKS`.
        codec: the job's codec.
        outer: text of the outer optimizer.
        interval_steps: local steps from one round to the next.
        learning_rate: of the workers' optimizers.
        seed: of initial values and batches. Arms that differ only in the codec have the same ones.
        steps: of each worker; a multiple of ``measure_every_steps``.
        num_workers: with equal shares of the data.
        measure_every_steps: a multiple of ``interval_steps``.
        late_steps: how many steps a worker trains between a push and its center; below ``interval_steps``. After the
            last push it trains no more.
        late_rule: what it then does with that center: a key of `study.late.LATE_RULES`.

    Raises:
        ValueError: one number is not a multiple of the other; an average would be later than the next push.
    """

    task: str
    codec: str
    outer: str
    interval_steps: int
    learning_rate: float
    seed: int
    steps: int
    num_workers: int = 4
    measure_every_steps: int = 50
    late_steps: int = 0
    late_rule: str = "keep"

    def __post_init__(self) -> None:
        if self.steps % self.measure_every_steps or self.measure_every_steps % self.interval_steps:
            raise ValueError(
                f"{self.steps} steps, measured every {self.measure_every_steps}, a round every {self.interval_steps}: "
                "each must be a multiple of the next"
            )
        if not 0 <= self.late_steps < self.interval_steps:
            raise ValueError(
                f"an average {self.late_steps} steps late, a round every {self.interval_steps}: "
                "it must come before the next push"
            )


@dataclass(frozen=True)
class Measured:
    """What was measured right after a round.

    Args:
        step: local steps done by each worker.
        rounds: done so far.
        train_loss: mean over all workers' batches since the last measurement, in nats.
        held_out_loss: of the center, in nats.
        up_bytes: encoded values that one worker has pushed so far.
        down_bytes: encoded values that one worker has got so far, without the first center.
    """

    step: int
    rounds: int
    train_loss: float
    held_out_loss: float
    up_bytes: int
    down_bytes: int


class _PlayedWorker:
    """One worker: its model, optimizer and batches."""

    def __init__(self, task: LearningTask, arm: Arm, task_index: int) -> None:
        self.model = task.model(arm.seed)
        self.variables: Variables = {n: p.detach().numpy() for n, p in self.model.named_parameters()}
        self._task, self._arm = task, arm
        self._optimizer = task.optimizer(self.model, arm.learning_rate)
        self._batches = task.batches(arm.seed, task_index, arm.num_workers)

    def step(self, steps_done: int) -> float:
        """One local step; returns the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._arm.learning_rate * self._task.rate_factor(steps_done / self._arm.steps)
        self._optimizer.zero_grad()
        loss = mean_loss_of(self.model, next(self._batches))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    def copy(self) -> Variables:
        """The variables as they are now."""
        return {name: values.copy() for name, values in self.variables.items()}

    def install(self, center: Variables, pushed: Variables) -> None:
        """Does with a center what the arm's rule says."""
        rule = LATE_RULES[self._arm.late_rule]
        for name, values in self.variables.items():
            values[...] = rule(center[name], pushed[name], values)


def play(task: LearningTask, arm: Arm) -> Iterator[Measured]:
    """Trains on one thread, and yields what is measured every ``measure_every_steps``.

    Raises:
        ValueError: there is no such outer optimizer.
        InvalidRequestError: there is no such codec.
    """
    torch.set_num_threads(1)
    workers = [_PlayedWorker(task, arm, index) for index in range(arm.num_workers)]
    server = PlayedServer(workers[0].variables, outer_optimizer(arm.outer), codec_named(arm.codec))
    center = task.model(arm.seed)
    pushed, arrived = list[Variables](), list[Variables]()
    losses, up_bytes, down_bytes = list[float](), 0, 0
    for step in range(1, arm.steps + 1):
        losses += [worker.step(step - 1) for worker in workers]
        if step % arm.interval_steps == 0:
            pushed, arrived = [worker.copy() for worker in workers], [worker.copy() for worker in workers]
            round_bytes = server.round(arrived)
            up_bytes += round_bytes.up
            down_bytes += round_bytes.down
        if step % arm.interval_steps == arm.late_steps:
            for worker, values, was in zip(workers, arrived, pushed, strict=False):  # before the first round: none
                worker.install(values, was)
        if step % arm.measure_every_steps == 0:
            center.load_state_dict({name: torch.from_numpy(values) for name, values in arrived[0].items()})
            held_out = _held_out_loss(center, task)
            yield Measured(step, server.rounds, float(np.mean(losses)), held_out, up_bytes, down_bytes)
            losses.clear()


def _held_out_loss(model: nn.Module, task: LearningTask) -> float:
    with torch.no_grad():
        return mean_loss_of(model, task.held_out).item()
