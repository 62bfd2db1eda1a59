"""Where a model keeps its tensors, to see without a walk through its modules that they are still there."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["TensorPlaces"]


class TensorPlaces:
    """What the modules of a model hold. Keeps nothing alive: a trainer may replace tensors to free their memory.

    Args:
        model: the model.
        tensors: some of its parameters and buffers. The caller keeps them alive as long as it uses this object, so
            that no other tensor can have their ids.
    """

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        modules = list(model.modules())
        self._modules = list(map(weakref.ref, modules))
        self._names, self._ids = _held(modules)
        # A model may have tensors elsewhere than in its modules' dictionaries.
        self._has_all = {id(tensor) for tensor in tensors.values()} <= set(self._ids)

    def are_same(self) -> bool:
        """Whether every module and each of ``tensors`` is where it was, and no other has been added."""
        modules = [module() for module in self._modules]
        if not self._has_all or any(module is None for module in modules):
            return False
        names, ids = _held(module for module in modules if module is not None)
        return ids == self._ids and names == self._names


def _held(modules: Iterable[torch.nn.Module]) -> tuple[list[str], list[int]]:
    """The names and ids of all that these modules hold."""
    names, ids = list[str](), list[int]()
    holder: dict[str, Any]
    for module in modules:
        for holder in (module._parameters, module._buffers, module._modules):
            if holder:
                names.extend(holder.keys())  # TorchScript's own dictionaries have no iterator
                ids.extend(map(id, holder.values()))
    return names, ids
