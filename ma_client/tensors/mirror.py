"""The local variables as numpy arrays: the tensors' own memory where possible, otherwise staging memory on the host."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.tensors.memories import Memories
from ma_client.tensors.refused_tensors import dtype_of, why_sharded
from ma_client.values.raw import LARGE_BYTES
from ma_client.values.same import SameArrays
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


_CENTERS = 4  # a server lends two averages in turn; the center of a pull lies elsewhere


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
        self._memory = Memories(tensors.values())
        self._host: SameArrays | None = None  # the host arrays of the tensors in `_memory`
        self._fitting: tuple[weakref.ref[SameArrays], ...] = ()  # arrays that were written to them lately

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
        if list(tensors) != list(self._tensors) or not all(map(operator.is_, tensors.values(), self._tensors.values())):
            self._look_at(tensors)

    @torch.no_grad()
    def gather(self) -> SameArrays:
        """The tensors' current values. An array may be the tensor's own memory. The next call returns the same arrays,
        with new values, as long as the tensors lie where they did. Raises ConflictError, as `follow`."""
        host = self._host_arrays()
        for name, staging in self._staging.items():
            tensor = self._tensors[name]
            staging.copy_(tensor, non_blocking=tensor.is_cuda)
        self._synchronize()
        return host

    @torch.no_grad()
    def scatter(self, arrays: Mapping[str, _Array], skip: Collection[str] = ()) -> None:
        """Writes ``arrays`` into the tensors of the same names, except those in ``skip``. Raises ConflictError, as
        `follow`."""
        host = self._host_arrays()
        if not self._copied_as_bytes(host, arrays, skip):
            for name, array in host.items():
                if name not in skip:
                    array[...] = arrays[name]
        for name, staging in self._staging.items():
            if name not in skip:
                tensor = self._tensors[name]
                tensor.copy_(staging, non_blocking=tensor.is_cuda)
        self._synchronize()

    def _look_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ConflictError, as `follow`."""
        self._fixed.check(tensors)
        _check_memory(tensors)
        self._tensors = dict(tensors)
        self._memory, self._host = Memories(tensors.values()), None

    def _host_arrays(self) -> SameArrays:
        # The same tensors may lie elsewhere by now: trainers set `parameter.data`, buffers are resized.
        if not self._memory.is_same():
            self._look_at(self._tensors)
        if self._host is None:
            used = self._staging
            self._staging = {}
            host = {name: self._host_tensor(name, tensor, used) for name, tensor in self._tensors.items()}
            self._host = SameArrays({name: as_numpy(tensor) for name, tensor in host.items()})
            self._fitting = ()
        return self._host

    def _copied_as_bytes(self, host: SameArrays, arrays: Mapping[str, _Array], skip: Collection[str]) -> bool:
        """Copies the bytes of arrays that are the same ones in every round; False: these are not, nothing was done."""
        if not isinstance(arrays, SameArrays) or arrays.bytes is None or host.bytes is None:
            return False
        if not any(known() is arrays for known in self._fitting):
            if not host.fits(arrays):
                return False
            self._fitting = (*self._fitting, weakref.ref(arrays))[-_CENTERS:]
        for name, into, values in zip(host, host.bytes, arrays.bytes, strict=True):
            if skip and name in skip:
                continue
            if len(values) < LARGE_BYTES:
                into[:] = values
            else:
                np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(values, np.uint8))
        return True

    def _host_tensor(self, name: str, tensor: torch.Tensor, used: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself, or its staging tensor, which may be among those ``used`` before."""
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg():
            return tensor
        staging = used.get(name)
        if staging is None:
            # On the host, whatever torch.set_default_device says.
            staging = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        self._staging[name] = staging
        return staging

    def _synchronize(self) -> None:
        # A tensor on a GPU has a staging tensor.
        for device in {self._tensors[name].device for name in self._staging if self._tensors[name].is_cuda}:
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
