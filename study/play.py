"""One training, played in one process: several workers with a share of the data each, and a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from modelaverage.codecs import codec_named
from modelaverage.outer import outer_optimizer
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

    Raises:
        ValueError: one number is not a multiple of the other.
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

    def __post_init__(self) -> None:
        if self.steps % self.measure_every_steps or self.measure_every_steps % self.interval_steps:
            raise ValueError(
                f"{self.steps} steps, measured every {self.measure_every_steps}, a round every {self.interval_steps}: "
                "each must be a multiple of the next"
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


def play(task: LearningTask, arm: Arm) -> Iterator[Measured]:
    """Trains on one thread, and yields what is measured every ``measure_every_steps``.

    Raises:
        ValueError: there is no such outer optimizer.
        InvalidRequestError: there is no such codec.
    """
    torch.set_num_threads(1)
    workers = [_PlayedWorker(task, arm, index) for index in range(arm.num_workers)]
    server = PlayedServer(workers[0].variables, outer_optimizer(arm.outer), codec_named(arm.codec))
    losses, up_bytes, down_bytes = list[float](), 0, 0
    for step in range(1, arm.steps + 1):
        losses += [worker.step(step - 1) for worker in workers]
        if step % arm.interval_steps:
            continue
        round_bytes = server.round([worker.variables for worker in workers])
        up_bytes += round_bytes.up
        down_bytes += round_bytes.down
        if step % arm.measure_every_steps == 0:
            held_out = _held_out_loss(workers[0].model, task)
            yield Measured(step, server.rounds, float(np.mean(losses)), held_out, up_bytes, down_bytes)
            losses.clear()


def _held_out_loss(model: nn.Module, task: LearningTask) -> float:
    with torch.no_grad():
        return mean_loss_of(model, task.held_out).item()
