"""One training, played in one process, and what is measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from study.arm import Arm
from study.methods import METHODS
from study.tasks.base import LearningTask, mean_loss_of

__all__ = ["Arm", "Measured", "play"]


@dataclass(frozen=True)
class Measured:
    """What was measured after a step and what followed from it.

    Args:
        step: local steps done by each worker.
        rounds: done so far.
        train_loss: mean over all workers' batches since the last measurement, in nats; NaN: no worker trained.
        held_out_loss: of the center, in nats.
        up_bytes: encoded values that one worker has pushed so far, mean of all workers.
        down_bytes: encoded values that one worker has got so far, without the first center.
        pushes: of all workers, that counted so far.
    """

    step: int
    rounds: int
    train_loss: float
    held_out_loss: float
    up_bytes: int
    down_bytes: int
    pushes: int = 0


def play(task: LearningTask, arm: Arm) -> Iterator[Measured]:
    """Trains on one thread, and yields what is measured every ``measure_every_steps``.

    Raises:
        ValueError: there is no such method or outer optimizer.
        InvalidRequestError: there is no such codec.
    """
    if arm.variation.method not in METHODS:
        raise ValueError(f"there is no method {arm.variation.method!r}; there are {', '.join(METHODS)}")
    torch.set_num_threads(1)
    method = METHODS[arm.variation.method](task, arm)
    center = task.model(arm.seed)
    losses = list[float]()
    for step in range(1, arm.steps + 1):
        losses += method.step(step - 1)
        if step % arm.measure_every_steps == 0:
            center.load_state_dict({name: torch.from_numpy(values) for name, values in method.center.items()})
            held_out, trained = _held_out_loss(center, task), float(np.mean(losses)) if losses else float("nan")
            yield Measured(step, method.rounds, trained, held_out, method.up_bytes, method.down_bytes, method.pushes)
            losses.clear()


def _held_out_loss(model: nn.Module, task: LearningTask) -> float:
    with torch.no_grad():
        return mean_loss_of(model, task.held_out).item()
