"""The local variables as numpy arrays: the tensors' own memory where possible, otherwise staging memory on the host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.tensors.refused_tensors import dtype_of, why_sharded
from modelaverage.errors import ConflictError, Reason

__all__ = ["FixedTensors", "HostMirror", "as_numpy"]

_Array = NDArray[np.generic]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The numpy type for each torch type. numpy knows bfloat16 only from ml_dtypes, so it uses a type of the same size.
_TYPES = {
    torch.float32: np.dtype(np.float32).str,
    torch.float64: np.dtype(np.float64).str,
    torch.float16: np.dtype(np.float16).str,
    torch.bfloat16: np.dtype(np.int16).str,
}


class HostMirror:
    """Host arrays for a set of tensors.

    A contiguous tensor on the CPU needs no copy. Others get a staging tensor that lives as long as the mirror, pinned
    if the tensor is on a GPU, so that copies run at the bus's speed.

    Args:
        tensors: by name; float32, float64, float16 or bfloat16, of any shape, layout and device.

    Raises:
        ConflictError: a tensor has no memory, or this process has only a part of it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._fixed = FixedTensors(tensors)
        self._staging: dict[str, torch.Tensor] = {}
        _check_memory(tensors)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Mirrors these tensors, of the same names, from now on.

        Raises:
            ConflictError: MANIFEST_MISMATCH: a tensor has a different shape or element type than before, or no memory,
                or this process has only a part of it.
        """
        self._fixed.check(tensors)
        _check_memory(tensors)
        self._tensors = dict(tensors)

    @torch.no_grad()
    def gather(self) -> dict[str, _Array]:
        """The tensors' current values. Do not write to them: an array may be the tensor's own memory."""
        host = {name: self._host_tensor(name, tensor) for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            if host[name] is not tensor:
                host[name].copy_(tensor, non_blocking=tensor.is_cuda)
        self._synchronize()
        return {name: as_numpy(tensor) for name, tensor in host.items()}

    @torch.no_grad()
    def scatter(self, arrays: Mapping[str, _Array], skip: Collection[str] = ()) -> None:
        """Writes ``arrays`` into the tensors of the same names, except those in ``skip``."""
        for name, tensor in self._tensors.items():
            if name in skip:
                continue
            host = self._host_tensor(name, tensor)
            as_numpy(host)[...] = arrays[name]
            if host is not tensor:
                tensor.copy_(host, non_blocking=tensor.is_cuda)
        self._synchronize()

    def _host_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg():
            return tensor
        staging = self._staging.get(name)
        if staging is None:
            # On the host, whatever torch.set_default_device says.
            staging = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._staging[name] = staging
        return staging

    def _synchronize(self) -> None:
        for device in {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


class FixedTensors:
    """Shapes and element types of tensors, which are fixed like those of the center.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._fixed = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ConflictError, MANIFEST_MISMATCH, if a tensor's shape or element type is another than at first."""
        for name, tensor in tensors.items():
            shape, dtype = self._fixed[name]
            if tensor.dtype is not dtype or tensor.shape != shape:
                raise ConflictError(_what_changed(name, tensor, shape, dtype), Reason.MANIFEST_MISMATCH)


class _Memory:
    """A tensor's memory for numpy; keeps the tensor alive as long as an array uses it."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": _TYPES[tensor.dtype],
        }


def as_numpy(tensor: torch.Tensor) -> _Array:
    """A contiguous CPU tensor as an array that shares its memory, until the tensor is resized.

    Does not use ``Tensor.numpy()``, after which the storage could not be resized; modules resize buffers.
    """
    if tensor.numel() == 0:  # an empty tensor may have no memory
        array: _Array = np.empty(tensor.shape, _TYPES[tensor.dtype])
    else:
        array = np.asarray(_Memory(tensor))
    return array.view(_BFLOAT16) if tensor.dtype is torch.bfloat16 else array


def _check_memory(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises if a tensor has lost its memory, which would crash the process when read, or if other processes have a
    part of it."""
    for name, tensor in tensors.items():
        problem = why_sharded(name, tensor)
        if problem is not None:
            raise ConflictError(problem, Reason.MANIFEST_MISMATCH)
        if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
            raise ConflictError(
                f"variable {name!r} of shape {list(tensor.shape)} has no memory: its storage was resized to 0 "
                "(sharded, or moved elsewhere); give it its values before the hook begins and before a round",
                Reason.MANIFEST_MISMATCH,
            )


def _what_changed(name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> str:
    before, now = str(dtype).removeprefix("torch."), dtype_of(tensor)
    return (
        f"variable {name!r} is {now}{list(tensor.shape)} now and {before}{list(shape)} in the center, whose variables "
        "are fixed when the chief initializes it: convert or resize it before you make the optimizer. A buffer that "
        "the model resizes in training cannot be averaged: leave it out, with ModelAverageCustomGetter(..., "
        "average_buffers=False, also_average=[names of the buffers that are to be averaged])"
    )
