"""A trap of trainers and torchrun: a wrapper that averages gradients leaves nothing for rounds to average."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from weakref import WeakSet

import torch

from modelaverage.logs import event

__all__ = ["warn_if_gradients_are_shared"]

_log = logging.getLogger("ma_client")

# By name, because not all of them are installed. torch.distributed's `replicate` also makes the first of them.
_WRAPPERS = frozenset({"DistributedDataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"})
_warned: WeakSet[torch.nn.Module] = WeakSet()


def warn_if_gradients_are_shared(model: torch.nn.Module, own_ranks: frozenset[int] = frozenset()) -> None:
    """Logs one warning for each model whose gradients are averaged over several processes at every step, unless all of
    these are ``own_ranks``, the ranks of this worker.

    Free if torch.distributed is not initialized. Otherwise it looks at every object of the process (0.25 s for a
    million), because a model does not know its wrapper.
    """
    if model in _warned or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_world_size() == 1:
        return
    own = {id(parameter) for parameter in model.parameters()}
    for wrapper, ranks in _synchronizing():
        if not ranks <= own_ranks and any(id(parameter) in own for parameter in wrapper.parameters()):
            _warned.add(model)
            name = type(wrapper).__name__
            _log.warning(
                "the model is wrapped in %s, which averages the gradients of %d processes at every step: these workers "
                "make the same updates and push the same model, so that rounds change nothing. Make these processes "
                "one worker (ModelAverageOptimizer's process_group), or train the model without the wrapper, or start "
                "the workers so that the trainer sees one process (ma-launch or ps-worker run, not torchrun): "
                "docs/trainers.md",
                name,
                len(ranks),
                extra=event("gradients_shared", wrapper=name, processes=len(ranks)),
            )
            return


def _synchronizing() -> Iterator[tuple[torch.nn.Module, frozenset[int]]]:
    """The wrappers that synchronize gradients now, each with the ranks of its processes."""
    is_wrapper: dict[type, bool] = {}
    for found in gc.get_objects():
        kind = type(found)  # isinstance would ask proxies for the class that they represent
        if kind not in is_wrapper:
            is_wrapper[kind] = not _WRAPPERS.isdisjoint(base.__name__ for base in kind.__mro__)
        if is_wrapper[kind] and isinstance(found, torch.nn.Module):
            group = getattr(found, "process_group", None)
            ranks = _ranks_of(group if isinstance(group, torch.distributed.ProcessGroup) else None)
            if len(ranks) > 1 and getattr(found, "require_backward_grad_sync", True):  # False in `no_sync()`
                yield found, ranks


def _ranks_of(group: torch.distributed.ProcessGroup | None) -> frozenset[int]:
    """The ranks of a group; those of all processes if it is None. A group that was destroyed has none."""
    try:
        return frozenset(torch.distributed.get_process_group_ranks(group))
    except KeyError:
        return frozenset()
