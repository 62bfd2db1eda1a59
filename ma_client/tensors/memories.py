"""Where tensors lie: whether views of their memory are still valid."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator

import torch

__all__ = ["Memories"]

_FACTS: tuple[Callable[[torch.Tensor], object], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.size,
    torch.Tensor.is_contiguous,
    operator.attrgetter("dtype"),
)


class Memories:
    """Where tensors lie, to find out whether they still lie there: a tensor may be resized or get other memory, which
    makes views of its memory invalid.

    Args:
        tensors: dense.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._facts = list(self._now())

    def is_same(self) -> bool:
        """Whether they have the same shapes and types, at the same addresses. A tensor that has lost its memory has
        another address."""
        return all(map(operator.eq, self._now(), self._facts))

    def _now(self) -> Iterator[tuple[object, ...]]:
        # All facts of a tensor, then those of the next: the other way round, its memory would be fetched several times.
        return zip(*(map(fact, self._tensors) for fact in _FACTS), strict=True)
