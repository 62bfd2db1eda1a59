"""What the tensors of a model are called in the center: their names in the model, without those of wrappers.

`torch.compile`, DistributedDataParallel and the like put a module around another one, and a segment of their own into
every name below. Workers may wrap their models differently, so these segments are left out. A wrapper is recognized by
its class, because a user's own submodule may also be called "module".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Tensors", "names_by_tensor", "tensors_of"]

# A wrapper class: its module, its name, and its name for the module inside. Only modules that are imported already are
# looked at: others have no instances, and importing some of these takes seconds.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


@dataclass(frozen=True)
class Tensors:
    """A model's tensors by name, each once, in the model's order.

    Args:
        parameters: all parameters, trained or not.
        buffers: all buffers.
        kept: names of the buffers that are part of the state dict.
    """

    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    kept: frozenset[str]


def tensors_of(model: torch.nn.Module) -> Tensors:
    """Collects a model's tensors.

    Raises:
        ValueError: without the wrappers' segments two parameters, or two buffers, have the same name.
    """
    prefixes, local = dict[str, str](), set[str]()
    for path, prefix, module in _modules(model, shared=False):
        prefixes[path] = prefix
        if module._non_persistent_buffers_set:
            local |= {_joined(path, name) for name in module._non_persistent_buffers_set}
    buffers = list(model.named_buffers())
    return Tensors(
        _by_name(model.named_parameters(), prefixes),
        _by_name(buffers, prefixes),
        frozenset(_name(name, prefixes) for name, _ in buffers if name not in local),
    )


def names_by_tensor(model: torch.nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id; a tied one has several."""
    names = dict[int, list[str]]()
    for _, prefix, module in _modules(model, shared=True):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(_joined(prefix, name))
    return names


def _modules(model: torch.nn.Module, shared: bool) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Every module: its path in the model, its path without wrappers, and itself. With ``shared``: at all of its
    paths."""
    inside = _Inside()
    seen = set[int]()  # if shared: the modules on the path here, so that a cycle ends

    def below(path: str, prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, prefix, module
        if module._modules:
            wrapped = inside[type(module)]
            for name, child in module._modules.items():
                if child is not None:
                    yield from below(_joined(path, name), prefix if name == wrapped else _joined(prefix, name), child)
        if shared:
            seen.discard(id(module))

    yield from below("", "", model)


class _Inside(dict[type, str | None]):
    """By wrapper class, its name for the module inside."""

    def __init__(self) -> None:
        self._wrappers = [
            (getattr(sys.modules[home], kind), attribute)
            for home, kind, attribute in _WRAPPERS
            if hasattr(sys.modules.get(home), kind)
        ]

    def __missing__(self, kind: type) -> str | None:
        found = next((attribute for wrapper, attribute in self._wrappers if issubclass(kind, wrapper)), None)
        self[kind] = found
        return found


def _name(name: str, prefixes: Mapping[str, str]) -> str:
    path, _, last = name.rpartition(".")
    return _joined(prefixes.get(path, path), last)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _by_name(found: Iterable[tuple[str, torch.Tensor]], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors, full_names = dict[str, torch.Tensor](), dict[str, str]()
    for full_name, tensor in found:
        name = _name(full_name, prefixes)
        if name in tensors:
            raise ValueError(
                f"{full_names[name]!r} and {full_name!r} are both {name!r} without what torch's wrappers "
                "(torch.compile, DistributedDataParallel) add to names; rename one"
            )
        tensors[name], full_names[name] = tensor, full_name
    return tensors
