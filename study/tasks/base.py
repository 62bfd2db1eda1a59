"""What a task is: a model, its data in equal shares for workers, and how a worker trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["EQUAL", "UNEQUAL", "LearningTask", "Samples", "mean_loss_of"]

EQUAL, UNEQUAL = "equal", "unequal"


@dataclass(frozen=True)
class Samples:
    """Some samples: what the model gets, [N, ...], and the class of each element that it predicts, [N] or [N, T]."""

    inputs: Tensor
    targets: Tensor


class LearningTask(ABC):
    """A classification task. Everything about it follows from seed, number of workers and a worker's index.

    Attributes:
        source: identifies the data: two tasks of a name with equal sources have the same samples.
        held_out: samples that no worker trains on.
    """

    name: ClassVar[str]
    source: str
    held_out: Samples

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The model before training, on the CPU, all parameters float32; its output has the classes last."""

    @abstractmethod
    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """A worker's own optimizer."""

    @abstractmethod
    def rate_factor(self, progress: float) -> float:
        """The factor for the learning rate when this part (0 to 1) of the steps is done."""

    @abstractmethod
    def batches(self, seed: int, task_index: int, num_workers: int, shards: str = EQUAL) -> Iterator[Samples]:
        """Endless batches from a worker's share of the training data; no two shares overlap. ``shards``: "equal" if
        shares are alike, "unequal" if each is of its own kind; all have the same size."""


def mean_loss_of(model: nn.Module, samples: Samples) -> Tensor:
    """The mean cross-entropy in nats, a scalar."""
    logits: Tensor = model(samples.inputs)
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), samples.targets.reshape(-1))
