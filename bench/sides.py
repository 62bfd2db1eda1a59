"""What `bench.average` compares: a worker's round with the parameter server, and the same with PyTorch and gloo.

Both sides begin with the same values, and every element of every result is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from bench.turns import values_of
from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession

__all__ = ["ArraySides", "ModelSides", "Sides", "sizes_of"]

_BIAS_SIZE = 256  # of every second tensor, as in a model of weights and biases
_NEVER = 1 << 30


class Sides(Protocol):
    """One worker's values, averaged in two ways."""

    def fill(self) -> None:
        """Sets both sides to this worker's values."""

    def ours(self) -> None:
        """One round with the parameter server."""

    def theirs(self) -> None:
        """The same with gloo."""

    def check(self) -> None:
        """Raises AssertionError unless every element on both sides is the average."""


class ModelSides:
    """A torch model: `ModelAverageOptimizer.average` beside PyTorch's `PeriodicModelAverager`.

    Args:
        session: of this worker.
        rank: from 0; the chief is 0.
        workers: how many there are.
        sizes: how many elements each tensor of the model has.
    """

    def __init__(self, session: ParameterServerSession, rank: int, workers: int, sizes: Sequence[int]) -> None:
        self._values, self._mean = values_of(rank, workers, sum(sizes))
        self._model, self._twin = _Model(sizes), _Model(sizes)
        getter = ModelAverageCustomGetter("cpu")
        local = torch.optim.SGD(getter(self._model).parameters(), lr=0.0)
        self._optimizer = ModelAverageOptimizer(local, workers, rank == 0, getter, _NEVER, session=session)
        self._optimizer.begin()
        for tensor in (*self._model.tensors, *self._twin.tensors):
            tensor.grad = torch.zeros_like(tensor)  # both sides average what has a gradient
        self._averager = PeriodicModelAverager(period=1)

    def fill(self) -> None:
        """Sets both models to this worker's values, by a local step, as training does."""
        self._model.write(self._values)
        self._twin.write(self._values)
        self._optimizer.step()

    def ours(self) -> None:
        """See `Sides`."""
        self._optimizer.average()

    def theirs(self) -> None:
        """See `Sides`."""
        self._averager.average_parameters(self._twin.parameters())

    def check(self) -> None:
        """See `Sides`."""
        assert np.array_equal(self._model.read(), self._mean), "the optimizer's average is wrong"
        assert np.array_equal(self._twin.read(), self._mean), "PeriodicModelAverager's average is wrong"


class ArraySides:
    """One array: `ParameterServerSession.push_and_average` with its defaults beside an all-reduce and a division.

    Args:
        session: of this worker.
        rank: from 0; the chief is 0.
        workers: how many there are.
        size: how many elements the array has.
    """

    def __init__(self, session: ParameterServerSession, rank: int, workers: int, size: int) -> None:
        self._session = session
        self._values, self._mean = values_of(rank, workers, size)
        self._averaged = self._values
        self._reduced = torch.zeros(size)
        if rank == 0:
            session.initialize({"x": self._values})
        session.pull(copy=False)

    def fill(self) -> None:
        """See `Sides`."""
        self._reduced.copy_(torch.from_numpy(self._values))

    def ours(self) -> None:
        """See `Sides`."""
        self._averaged = self._session.push_and_average({"x": self._values}).center["x"]

    def theirs(self) -> None:
        """See `Sides`."""
        dist.all_reduce(self._reduced)
        self._reduced.div_(dist.get_world_size())

    def check(self) -> None:
        """See `Sides`."""
        assert np.array_equal(self._averaged, self._mean), "the session's average is wrong"
        assert np.array_equal(self._reduced.numpy(), self._mean), "gloo's average is wrong"


class _Model(torch.nn.Module):
    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.tensors = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in sizes])

    @torch.no_grad()
    def write(self, values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
        parts = torch.split(torch.from_numpy(values), [tensor.numel() for tensor in self.tensors])
        torch._foreach_copy_(list(self.tensors), list(parts))

    @torch.no_grad()
    def read(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        found: np.ndarray[tuple[int], np.dtype[np.float32]] = torch.cat(list(self.tensors)).numpy()
        return found


def sizes_of(parameters: int, tensors: int) -> list[int]:
    """The sizes of a model's tensors: every second one is a small bias, unless there is only one; the others share the
    rest."""
    biases = tensors // 2
    rest, weights = parameters - biases * _BIAS_SIZE, tensors - biases
    sizes = [rest // weights + (number < rest % weights) for number in range(weights)]
    return [size for weight in sizes for size in (weight, _BIAS_SIZE)][:tensors]
