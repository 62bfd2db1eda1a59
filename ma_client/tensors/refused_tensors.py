"""Which tensors cannot be averaged as the plain arrays that a worker pushes, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch.nn.parameter import is_lazy

from modelaverage.manifest import DTYPES

__all__ = [
    "can_be_averaged",
    "dtype_of",
    "is_dtensor",
    "is_flattened",
    "kind_of",
    "sharded_variable",
    "why_refused",
    "why_sharded",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SHARDING = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
)
_IN_A_GROUP = (
    "make the ranks one worker with ModelAverageOptimizer(..., process_group=torch.distributed.group.WORLD), or give "
    "the group that they are"
)


def dtype_of(tensor: torch.Tensor) -> str:
    """The element type's name in messages and manifests."""
    return str(tensor.dtype).removeprefix("torch.")


def kind_of(tensor: torch.Tensor) -> str:
    """A tensor's kind for messages: its layout if it is not dense, otherwise its element type."""
    if is_lazy(tensor) or (tensor.layout is torch.strided and not tensor.is_nested):
        return dtype_of(tensor)
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def can_be_averaged(tensor: torch.Tensor) -> bool:
    """Whether tensors of this element type and layout can be averaged."""
    return kind_of(tensor) in DTYPES


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which a process may have a part."""
    return type(tensor).__name__ == "DTensor"


def is_flattened(tensor: torch.Tensor) -> bool:
    """Whether FSDP1 keeps it as a part of a flat parameter, of which a process may have a part."""
    return bool(getattr(tensor, "_fsdp_flattened", False))  # FSDP's mark


def why_sharded(name: str, tensor: torch.Tensor) -> str | None:
    """Why a process alone cannot average a variable, and what to do; None: it can."""
    if is_flattened(tensor):
        return (
            f"variable {name!r} is sharded by FSDP ({type(tensor).__name__}): each rank has a part of it; {_IN_A_GROUP}"
        )
    if is_dtensor(tensor):
        return f"variable {name!r} is a DTensor, of which each rank has a part; {_IN_A_GROUP}"
    return None


def sharded_variable(model: torch.nn.Module, variables: Mapping[str, torch.Tensor]) -> str | None:
    """Why a process alone cannot average a model, of which these are the center variables; None: it can."""
    kinds = tuple(getattr(sys.modules[home], kind) for home, kind in _SHARDING if hasattr(sys.modules.get(home), kind))
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            what = f"module {name!r} of the model" if name else "the model"
            return f"{what} is sharded by FSDP ({type(module).__name__}): each rank has a part of it; {_IN_A_GROUP}"
    return next(filter(None, (why_sharded(name, tensor) for name, tensor in variables.items())), None)


def why_refused(name: str, tensor: torch.Tensor) -> str | None:
    """Why a variable of any element type cannot be averaged, and what to do; None: it can."""
    kind = type(tensor)
    if is_lazy(tensor):
        return (
            f"variable {name!r} has no shape yet ({kind.__name__}): run a batch through the model before you give it "
            "to the getter"
        )
    if getattr(tensor, "_is_flat_param", False):
        return (
            f"variable {name!r} is a flat parameter of FSDP, in which the model's own parameters have no names; make "
            "it with FullyShardedDataParallel(..., use_orig_params=True)"
        )
    if kind not in _PLAIN and not is_dtensor(tensor):
        return (
            f"variable {name!r} is a {kind.__module__}.{kind.__qualname__}, and only plain tensors are averaged; "
            "give the getter a model with plain ones, or leave it out: freeze a parameter (requires_grad=False), and "
            "take buffers out with average_buffers=False"
        )
    if kind_of(tensor) != dtype_of(tensor):
        return f"variable {name!r} is {kind_of(tensor)}, and only dense tensors are averaged; make it dense"
    if tensor.is_meta:
        return (
            f"variable {name!r} is on the meta device and has no values: make the model on a real device, or call "
            "model.to_empty(device=...) and initialize it, before you give it to the getter"
        )
    return None
