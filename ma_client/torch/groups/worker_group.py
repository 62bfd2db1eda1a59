"""The ranks of a worker group, and what is sent between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["WorkerGroup"]


class WorkerGroup:
    """A group of torch.distributed whose ranks are one worker. Every method but the properties is a collective: all
    ranks call it, in the same order.

    Objects travel between CPUs. If the group's backend has no way for those (NCCL alone), a group with gloo is made
    beside it.

    Args:
        given: the user's group, of which this process is a rank.

    Raises:
        TypeError: that is no process group.
        ValueError: this process is not in it.
    """

    def __init__(self, given: object) -> None:
        if given is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is no rank of the process_group that it gave: give each process the group of its own "
                "worker (the first that torch.distributed.new_subgroups returns)"
            )
        if not isinstance(given, dist.ProcessGroup):
            raise TypeError(
                f"process_group is {given!r:.80}; give a group of torch.distributed, such as "
                "torch.distributed.group.WORLD after init_process_group, or leave it out for a worker of one process"
            )
        self._given = given
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(given))
        """The ranks in the whole of torch.distributed, by rank in this group."""
        self.rank: int = dist.get_rank(given)
        """The rank of this process in the group."""
        self._of_cpus = given if _has_way_for_cpus(given) else _with_gloo(self.ranks)

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0 of the group, which talks to the servers."""
        return self.rank == 0

    def told(self, value: Any = None) -> Any:
        """What rank 0 gave here. Other ranks give nothing."""
        box = [value]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self._of_cpus)
        return box[0]

    def collected(self, value: Any) -> list[Any]:
        """What every rank gave here, by rank in the group."""
        found: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(found, value, group=self._of_cpus)
        return found

    @torch.no_grad()
    def copy_from_leader(self, tensors: Iterable[torch.Tensor]) -> None:
        """Makes these tensors, the same on all ranks by shape and element type, equal to rank 0's."""
        sent = list[tuple[torch.Tensor, torch.Tensor, Any]]()
        for tensor in tensors:
            target = tensor.detach()
            buffer = target.contiguous()
            group = self._of_cpus if buffer.device.type == "cpu" else self._given
            sent.append((target, buffer, dist.broadcast(buffer, src=self.ranks[0], group=group, async_op=True)))
        for target, buffer, work in sent:
            work.wait()
            if buffer.data_ptr() != target.data_ptr():
                target.copy_(buffer)


def _has_way_for_cpus(group: dist.ProcessGroup) -> bool:
    return "cpu:" in dist.get_backend_config(group)


def _with_gloo(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    made: dist.ProcessGroup = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
    return made
