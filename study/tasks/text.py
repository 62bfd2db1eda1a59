"""Bytes of Python source, and a small transformer that predicts each byte from those before it.

The text is the source of the standard library of the Python that runs this, so every machine has it and nothing is
downloaded. Its license is the Python Software Foundation License Version 2 (LICENSE.txt of the installation; some
modules carry compatible notices of their own). The text is read where it lies, and no part of it is in this project.
Another version of Python has another text, so compare losses only between runs with the same `source`.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from study.tasks.base import EQUAL, UNEQUAL, LearningTask, Samples

__all__ = ["ByteTransformer", "CONTEXT", "TextTask", "standard_library"]

CONTEXT = 64
"""Bytes in a sequence."""
_BATCH = 8
_WIDTH = 64
_HEADS = 4
_LAYERS = 2
_HELD_OUT_PART = 0.1
_WARM_UP_PART = 0.05
_LEAST_FACTOR = 0.1
# Packages of every supported version, besides the single modules; without tests and tables.
_PACKAGES = "asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib xml"


def standard_library(shards: str = EQUAL) -> tuple[bytes, bytes]:
    """The text to train on, and whole other files that are held out (a tenth of all files).

    Files come in the order of their names' hashes, so that equal contiguous shares of the text are alike. For unequal
    shards those to train on come in the order of their names, so that packages stay together.

    Raises:
        OSError: this Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.glob("*.py") if not path.name.startswith("_sysconfigdata")]
    for package in _PACKAGES.split():
        paths += (root / package).rglob("*.py")
    if not paths:
        raise FileNotFoundError(f"no source of the standard library lies in {root}")
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    held_out_count = math.ceil(len(paths) * _HELD_OUT_PART)
    parts = paths[held_out_count:], paths[:held_out_count]
    if shards == UNEQUAL:
        parts[0].sort()
    training, held_out = (b"".join(path.read_bytes() for path in part) for part in parts)
    return training, held_out


class _Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(_WIDTH)
        self.attention_in = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.attention_out = nn.Linear(_WIDTH, _WIDTH)
        self.norm_perceptron = nn.LayerNorm(_WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.ReLU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, T, width] from [N, T, width]."""
        parts = self.attention_in(self.norm_attention(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(seen.transpose(1, 2).flatten(2))
        changed: Tensor = hidden + self.perceptron(self.norm_perceptron(hidden))
        return changed


class ByteTransformer(nn.Module):
    """Two layers of width 64 with four heads; 120,576 parameters. The output layer is the byte embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, _WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, _WIDTH) * 0.02)
        self.blocks = nn.Sequential(*[_Block() for _ in range(_LAYERS)])
        self.norm = nn.LayerNorm(_WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, read: Tensor) -> Tensor:
        """Logits of each next byte, [N, T, 256], from bytes (int64, [N, T])."""
        hidden = self.embed(read) + self.position[: read.shape[1]]
        logits: Tensor = nn.functional.linear(self.norm(self.blocks(hidden)), self.embed.weight)
        return logits


class TextTask(LearningTask):
    """Batches of 8 sequences of 64 bytes at random places of a worker's share; AdamW with a weight decay of 0.1, whose
    learning rate rises over the first twentieth of the steps and falls to a tenth along a cosine."""

    name: ClassVar[str] = "text"
    held_out_sequences: ClassVar[int] = 256

    def __init__(self) -> None:
        training, held_out = standard_library()
        digest = hashlib.sha256(training + held_out).hexdigest()[:16]
        self.source = f"standard library of Python {platform.python_version()}, sha256 {digest}"
        by_name, _ = standard_library(UNEQUAL)
        self._training = {EQUAL: np.frombuffer(training, np.uint8), UNEQUAL: np.frombuffer(by_name, np.uint8)}
        text = np.frombuffer(held_out, np.uint8)
        places = np.linspace(0, len(text) - CONTEXT - 1, self.held_out_sequences).astype(np.int64)
        self.held_out = _sequences(text, places)

    def model(self, seed: int) -> nn.Module:
        """The same for a seed in every process."""
        torch.manual_seed(seed)
        return ByteTransformer()

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def rate_factor(self, progress: float) -> float:
        """Warm-up and cosine."""
        if progress < _WARM_UP_PART:
            return max(progress / _WARM_UP_PART, 1e-2)
        done = (progress - _WARM_UP_PART) / (1 - _WARM_UP_PART)
        return _LEAST_FACTOR + (1 - _LEAST_FACTOR) * (1 + math.cos(math.pi * done)) / 2

    def batches(self, seed: int, task_index: int, num_workers: int, shards: str = EQUAL) -> Iterator[Samples]:
        """Shares are contiguous and equally long."""
        text = self._training[shards]
        length = len(text) // num_workers
        share = text[task_index * length : (task_index + 1) * length]
        places = np.random.default_rng((seed, task_index))
        while True:
            yield _sequences(share, places.integers(0, len(share) - CONTEXT, _BATCH))


def _sequences(text: NDArray[np.uint8], places: NDArray[np.int64]) -> Samples:
    """The sequences that begin at these places; the target of each byte is the next one."""
    found = torch.from_numpy(text[places[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
    return Samples(found[:, :-1], found[:, 1:])
