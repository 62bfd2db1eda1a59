"""The center variables of a model that the ranks of a group hold together, as host arrays of rank 0."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from ma_client.tensors.mirror import FixedTensors, HostMirror
from ma_client.tensors.refused_tensors import is_flattened
from ma_client.torch.groups.dtensors import DTensors
from ma_client.torch.groups.fsdp1 import FlatParameters
from ma_client.torch.groups.replicated import Replicated
from ma_client.torch.groups.worker_group import WorkerGroup
from ma_client.values.raw import bytes_of

__all__ = ["GroupMirror", "Holding"]

_Arrays = Mapping[str, NDArray[Any]]


class Holding(Protocol):
    """One way in which the ranks of a group hold center variables. Both methods are collectives.

    To add a way, write it in a file of its own and choose it in `_holdings`.
    """

    def gather(self) -> _Arrays:
        """The whole variables by name, in memory of rank 0; valid until the next call. Nothing on other ranks."""

    def scatter(self, arrays: _Arrays, skip: Collection[str]) -> None:
        """Replaces the variables, except those in ``skip``, on all ranks by what rank 0 has in ``arrays``."""


class GroupMirror:
    """Like `HostMirror`, but for tensors that all ranks of a group hold; `gather` and `scatter` are collectives.

    Args:
        group: the ranks.
        model: what the tensors belong to.
        tensors: by name; plain tensors, DTensors, or parameters that FSDP1 has flattened.

    Attributes:
        fingerprint: differs between ranks whose variables do not have the same names, shapes and element types.
    """

    def __init__(self, group: WorkerGroup, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._group = group
        self._model = model
        self._fixed = FixedTensors(tensors)
        self._tensors = dict(tensors)
        self._holdings = _holdings(group, model, tensors)
        about = [(name, tuple(_whole_shape(tensor)), str(tensor.dtype)) for name, tensor in tensors.items()]
        self.fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As `HostMirror.follow`."""
        self._fixed.check(tensors)
        if any(tensor is not self._tensors[name] for name, tensor in tensors.items()):
            self._tensors = dict(tensors)
            self._holdings = _holdings(self._group, self._model, tensors)

    def digest(self) -> int:
        """Differs between ranks whose trained parameters, of those that each has as a whole, differ. No collective."""
        found = 0
        for name, tensor in self._tensors.items():
            is_trained = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
            if is_trained and not isinstance(tensor, DTensor) and not is_flattened(tensor):
                (array,) = HostMirror({name: tensor}).gather().values()
                found = zlib.crc32(bytes_of(array), found)
        return found

    def gather(self) -> dict[str, NDArray[Any]]:
        """The whole variables by name, on rank 0; nothing on others."""
        found = dict[str, NDArray[Any]]()
        for holding in self._holdings:
            found |= holding.gather()
        return {name: found[name] for name in self._tensors} if self._group.is_leader else {}

    def scatter(self, arrays: _Arrays, skip: Collection[str] = ()) -> None:
        """Replaces the variables, except those in ``skip``, on all ranks by what rank 0 has in ``arrays``."""
        for holding in self._holdings:
            holding.scatter(arrays, skip)


def _holdings(group: WorkerGroup, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[Holding]:
    of_fsdp1 = {name: tensor for name, tensor in tensors.items() if is_flattened(tensor)}
    distributed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    parted = of_fsdp1.keys() | distributed.keys()
    replicated = {name: tensor for name, tensor in tensors.items() if name not in parted}
    found: list[Holding] = []
    if replicated:
        found.append(Replicated(group, replicated))
    if distributed:
        found.append(DTensors(group, distributed))
    if of_fsdp1:
        found.append(FlatParameters(group, model, of_fsdp1))
    return found


def _whole_shape(tensor: torch.Tensor) -> torch.Size:
    return torch.Size() if is_flattened(tensor) else tensor.shape  # FSDP1 gives ranks parts of different shapes
