"""The local variables as numpy sees them: the tensors' own memory where possible, staging memory on the host else."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["HostMirror"]

_Array = NDArray[np.generic]


class HostMirror:
    """Host arrays for a set of tensors.

    A contiguous tensor on the CPU needs no copy. Others get a staging tensor that lives as long as the mirror, pinned
    if the tensor is on a GPU, so that copies run at the bus's speed.

    Args:
        tensors: by name; float32, float64, float16 or bfloat16, of any shape, layout and device.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._staging: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """From now on these tensors, of the same names, are mirrored."""
        self._tensors = dict(tensors)

    @torch.no_grad()
    def gather(self) -> dict[str, _Array]:
        """The tensors' values now. Read-only by agreement: an array may be the tensor's own memory."""
        host = {name: self._host_tensor(name, tensor) for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            if host[name] is not tensor:
                host[name].copy_(tensor, non_blocking=tensor.is_cuda)
        self._synchronize()
        return {name: _as_numpy(tensor) for name, tensor in host.items()}

    @torch.no_grad()
    def scatter(self, arrays: Mapping[str, _Array], skip: Collection[str] = ()) -> None:
        """Writes ``arrays`` into the tensors of the same names, but for those in ``skip``."""
        for name, tensor in self._tensors.items():
            if name in skip:
                continue
            host = self._host_tensor(name, tensor)
            _as_numpy(host)[...] = arrays[name]
            if host is not tensor:
                tensor.copy_(host, non_blocking=tensor.is_cuda)
        self._synchronize()

    def _host_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return tensor
        staging = self._staging.get(name)
        if staging is None:
            staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._staging[name] = staging
        return staging

    def _synchronize(self) -> None:
        for device in {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _as_numpy(tensor: torch.Tensor) -> _Array:
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # numpy knows it only by way of ml_dtypes
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: _Array = tensor.numpy()
    return array
