"""Center variables that every rank of a group has as a whole: the parameters of a model under DDP, and buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from ma_client.tensors.mirror import HostMirror
from ma_client.torch.groups.worker_group import WorkerGroup

__all__ = ["Replicated"]

_Arrays = Mapping[str, NDArray[Any]]


class Replicated:
    """Equal tensors on all ranks. Rank 0's are what is averaged; the average is copied to all.

    Args:
        group: the ranks.
        tensors: by name.
    """

    def __init__(self, group: WorkerGroup, tensors: Mapping[str, torch.Tensor]) -> None:
        self._group = group
        self._tensors = tensors
        self._mirror = HostMirror(tensors)

    def gather(self) -> _Arrays:
        """See `groups.mirror.Holding`."""
        return self._mirror.gather() if self._group.is_leader else {}

    def scatter(self, arrays: _Arrays, skip: Collection[str]) -> None:
        """See `groups.mirror.Holding`."""
        if self._group.is_leader:
            self._mirror.scatter(arrays, skip)
        self._group.copy_from_leader(tensor for name, tensor in self._tensors.items() if name not in skip)
