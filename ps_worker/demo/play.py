"""All workers of the built-in workload and their server, played in one process: the center is bit for bit that of two
real workers with the same settings. So the demo shows what another outer optimizer would have given, without a second
cluster."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from modelaverage.outer import OuterOptimizer
from modelaverage.outer.base import Slots, Values
from ps_worker.demo.digits import (
    DigitsData,
    DigitsNet,
    Images,
    Meter,
    Report,
    batches_of,
    initial_model,
    local_optimizer,
)
from ps_worker.demo.digits_config import DigitsConfig

__all__ = ["play"]


class _Player:
    """One worker."""

    def __init__(self, config: DigitsConfig, part: Images, task_index: int) -> None:
        self.model = initial_model(config)
        self._optimizer = local_optimizer(self.model, config)
        self._batches = batches_of(part, config, task_index)

    def step(self) -> float:
        """One local step; returns the loss before it."""
        batch = next(self._batches)
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch.pixels), batch.digits)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()


class _PlayedCenter:
    """The server's part: the center and the outer optimizer's state, by variable."""

    def __init__(self, model: DigitsNet, outer: OuterOptimizer) -> None:
        self._outer = outer
        self._values: list[Values] = [values.copy() for values in _values_of(model)]
        self._states: list[Slots] = [outer.init(values) for values in self._values]

    def round(self, players: list[_Player], step: int) -> None:
        """Averages the players' variables, takes the outer step, and installs the center."""
        sums = [np.array(values) for values in _values_of(players[0].model)]
        for player in players[1:]:
            for total, values in zip(sums, _values_of(player.model), strict=True):
                total += values
        for index, total in enumerate(sums):
            average = total / np.float32(len(players))
            center, state = self._outer.update(self._values[index], average, self._states[index], step)
            self._values[index], self._states[index] = center, state
        for player in players:
            for values, center in zip(_values_of(player.model), self._values, strict=True):
                values[...] = center


def play(config: DigitsConfig, num_workers: int, outer: OuterOptimizer, name: str, report: Report) -> DigitsNet:
    """Trains as ``num_workers`` workers and a server would, and returns the model with the last center.

    Args:
        config: how the workers train; its own outer optimizer is not used.
        num_workers: each with its share of the images.
        outer: turns the center and the average of a round into the next center.
        name: under which events are reported.
        report: called with each event: those of worker 0, and the center's accuracy after each round.

    Raises:
        ValueError: a worker's share is smaller than a batch.
    """
    torch.set_num_threads(1)
    data = DigitsData.load()
    players = [_Player(config, data.part(num_workers, index, config.batch_size), index) for index in range(num_workers)]
    center = _PlayedCenter(players[0].model, outer)
    meter = Meter(name, config, report)
    for step in range(1, config.steps + 1):
        loss, *_ = [player.step() for player in players]
        meter.step_done(loss)
        if step % config.interval_steps == 0:
            center.round(players, step // config.interval_steps - 1)
            meter.evaluated(players[0].model, data.test)
        meter.report_progress_at(step)
    return players[0].model


def _values_of(model: nn.Module) -> Iterator[Values]:
    """The model's own memory, flat, by variable."""
    return (parameter.detach().reshape(-1).numpy() for parameter in model.parameters())
