"""Center variables that are DTensors, of which every rank of a group has a part: FSDP2, tensor parallelism."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor, distribute_tensor

from ma_client.tensors.mirror import as_numpy
from ma_client.torch.groups.worker_group import WorkerGroup

__all__ = ["DTensors"]

_Arrays = Mapping[str, NDArray[Any]]


class DTensors:
    """Each is gathered and given back alone: no rank but the first has more than one whole variable at a time, and that
    one has the others in host memory.

    Args:
        group: the ranks.
        tensors: by name.
    """

    def __init__(self, group: WorkerGroup, tensors: Mapping[str, DTensor]) -> None:
        self._group = group
        self._tensors = tensors
        self._host: dict[str, torch.Tensor] = {}
        if group.is_leader:
            self._host = {name: _on_host(tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def gather(self) -> _Arrays:
        """See `groups.mirror.Holding`."""
        for name, tensor in self._tensors.items():
            # A parameter that FSDP offloads lies on the CPU, but its ranks exchange it between their devices.
            exchanged = cast("DTensor", tensor.detach().to(tensor.device_mesh.device_type))
            whole = exchanged.full_tensor()
            if self._group.is_leader:
                self._host[name].copy_(whole)
        return {name: as_numpy(host) for name, host in self._host.items()}

    @torch.no_grad()
    def scatter(self, arrays: _Arrays, skip: Collection[str]) -> None:
        """See `groups.mirror.Holding`."""
        for name, tensor in self._tensors.items():
            if name in skip:
                continue
            mesh = tensor.device_mesh
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device_type)
            if self._group.is_leader:
                host = self._host[name]
                as_numpy(host)[...] = arrays[name]
                whole.copy_(host)
            self._group.copy_from_leader([whole])
            # Without a source rank every rank takes its own part of what it has.
            parts = distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(parts.to_local())


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")
