"""Center variables in FSDP's flat parameters (`FullyShardedDataParallel`, FSDP1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FullyShardedDataParallel

from ma_client.tensors.mirror import as_numpy
from ma_client.torch.groups.worker_group import WorkerGroup
from modelaverage.errors import ConflictError, Reason

__all__ = ["FlatParameters"]

_Arrays = Mapping[str, NDArray[Any]]
_Unit = tuple[torch.nn.Module, dict[str, torch.Tensor]]


class FlatParameters:
    """Each of FSDP's units (the modules that it has wrapped) is gathered and given back alone, as its forward does it.

    Args:
        group: the ranks.
        model: has these modules; made with ``use_orig_params=True``, so that it keeps its own parameters.
        tensors: by name.

    Raises:
        ConflictError: MANIFEST_MISMATCH: a tensor is in none of the model's units.
    """

    def __init__(self, group: WorkerGroup, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._group = group
        self._units = _units(model, tensors)

    @torch.no_grad()
    def gather(self) -> _Arrays:
        """See `groups.mirror.Holding`."""
        found = dict[str, NDArray[np.generic]]()
        for unit, tensors in self._units:
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                if self._group.is_leader:
                    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                    found |= {name: as_numpy(copy.contiguous()) for name, copy in copies.items()}
        return found

    @torch.no_grad()
    def scatter(self, arrays: _Arrays, skip: Collection[str]) -> None:
        """See `groups.mirror.Holding`."""
        for unit, tensors in self._units:
            changed = {name: tensor for name, tensor in tensors.items() if name not in skip}
            if not changed:
                continue
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False):
                if self._group.is_leader:
                    for name, tensor in changed.items():
                        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        as_numpy(host)[...] = arrays[name]
                        tensor.copy_(host)
                self._group.copy_from_leader(changed.values())


def _units(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[_Unit]:
    """The units that have these tensors. A parameter belongs to the innermost of the units around it."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    unit_of = dict[str, torch.nn.Module]()
    for each in FullyShardedDataParallel.fsdp_modules(model):  # outer ones first
        unit_of |= {names[id(parameter)]: each for parameter in each.parameters() if id(parameter) in names}
    found = dict[int, _Unit]()
    for name, tensor in tensors.items():
        unit = unit_of.get(name)
        if unit is None:
            raise ConflictError(
                f"variable {name!r} is in a flat parameter of a FullyShardedDataParallel around the getter's model; "
                "give the getter what FullyShardedDataParallel returned",
                Reason.MANIFEST_MISMATCH,
            )
        found.setdefault(id(unit), (unit, {}))[1][name] = tensor
    return list(found.values())
