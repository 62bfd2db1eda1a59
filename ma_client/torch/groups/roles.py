"""Which role a rank of a worker group has."""

from __future__ import annotations

from ma_client.torch.groups.follower import Follower
from ma_client.torch.groups.leader import Leader
from ma_client.torch.groups.worker_group import WorkerGroup

__all__ = ["role_in"]


def role_in(process_group: object) -> Leader | Follower:
    """The role of this process in the worker that this group is.

    Raises:
        TypeError, ValueError: as `WorkerGroup`.
    """
    group = WorkerGroup(process_group)
    return Leader(group) if group.is_leader else Follower(group)
