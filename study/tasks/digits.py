"""The digits of the demo: 1,797 images of 8 x 8 pixels and a convolutional network with 9,930 parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from ps_worker.demo.digits import DigitsData, batches_of, initial_model, local_optimizer
from ps_worker.demo.digits_config import DigitsConfig
from study.tasks.base import EQUAL, UNEQUAL, LearningTask, Samples

__all__ = ["DigitsTask"]


class DigitsTask(LearningTask):
    """The demo's model, shares, batches of 32 and SGD with a momentum of 0.9, at a constant learning rate."""

    name: ClassVar[str] = "digits"

    def __init__(self) -> None:
        self.source = "the digits of scikit-learn, the demo's split"
        self._config = DigitsConfig()
        self._data = DigitsData.load()
        self.held_out = Samples(self._data.test.pixels, self._data.test.digits)

    def model(self, seed: int) -> nn.Module:
        """The demo's."""
        return initial_model(replace(self._config, seed=seed))

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """The demo's."""
        return local_optimizer(model, replace(self._config, learning_rate=learning_rate))

    def rate_factor(self, progress: float) -> float:  # noqa: ARG002
        """Constant."""
        return 1.0

    def batches(self, seed: int, task_index: int, num_workers: int, shards: str = EQUAL) -> Iterator[Samples]:
        """The demo's; unequal: each worker has other digits."""
        config = replace(self._config, seed=seed)
        part = self._data.part(num_workers, task_index, config.batch_size)
        if shards == UNEQUAL:
            size = len(self._data.train) // num_workers
            by_digit = self._data.train.digits.argsort(stable=True)
            part = self._data.train[by_digit[task_index * size : (task_index + 1) * size]]
        for images in batches_of(part, config, task_index):
            yield Samples(images.pixels, images.digits)
