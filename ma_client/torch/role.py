"""The role of a process in its worker: it is the worker, or one rank of the group that is the worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from ma_client.cluster.resolvers import WORKER_PER, ranks_of_this_worker
from ma_client.cluster.settings import ClusterError
from ma_client.session import ParameterServerSession
from ma_client.tensors.mirror import HostMirror
from ma_client.tensors.refused_tensors import sharded_variable
from ma_client.torch.custom_getter import ModelAverageCustomGetter
from ma_client.torch.local_state import ParameterState
from ma_client.torch.local_variables import Mirror
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.training.base import WorkerTraining
from ma_client.torch.training.parts import WorkerParts, solo_training
from ma_client.torch.weighing import Weight

__all__ = ["Alone", "WorkerRole", "role_of"]


class WorkerRole(Protocol):
    """How a process takes part in its worker's training. The methods are called once each, in this order."""

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of this worker in torch.distributed; empty: it is one process."""

    def check(self, getter: ModelAverageCustomGetter) -> None:
        """Raises ValueError if the getter's model is held in a way that this worker cannot average."""

    def settings(self, read: Callable[[], OptimizerSettings]) -> OptimizerSettings:
        """The settings of the worker: what ``read`` returns or raises, in the process that leads."""

    def mirror(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mirror:
        """The model's center variables as host arrays."""

    def weight(self, weight: Weight) -> Weight:
        """The worker's weight, given that of this process."""

    def state(self, state: ParameterState) -> ParameterState:
        """The state of the worker's local optimizer, given that of this process."""

    def training(self, parts: WorkerParts, session: ParameterServerSession | None) -> WorkerTraining:
        """The part of this process in the training."""


class Alone:
    """A worker of one process; see `WorkerRole`."""

    ranks: frozenset[int] = frozenset()

    def check(self, getter: ModelAverageCustomGetter) -> None:
        """See `WorkerRole`."""
        problem = sharded_variable(getter.model, getter.variables())
        if problem is not None:
            raise ValueError(problem)

    def settings(self, read: Callable[[], OptimizerSettings]) -> OptimizerSettings:
        """See `WorkerRole`."""
        ranks = ranks_of_this_worker(os.environ)
        if ranks > 1:
            raise ClusterError(
                f"{WORKER_PER}='node' makes the {ranks} processes of this node one worker, but this one has made an "
                "optimizer of its own: give the group that they are, ModelAverageOptimizer(..., process_group=group), "
                f"or unset {WORKER_PER} (docs/groups.md)"
            )
        return read()

    def mirror(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mirror:  # noqa: ARG002
        """See `WorkerRole`."""
        return HostMirror(tensors)

    def weight(self, weight: Weight) -> Weight:
        """See `WorkerRole`."""
        return weight

    def state(self, state: ParameterState) -> ParameterState:
        """See `WorkerRole`."""
        return state

    def training(self, parts: WorkerParts, session: ParameterServerSession | None) -> WorkerTraining:
        """See `WorkerRole`."""
        return solo_training(parts, session)


def role_of(process_group: object) -> WorkerRole:
    """The role of this process.

    Args:
        process_group: the group of torch.distributed whose ranks are one worker; None: this process is one.

    Raises:
        TypeError, ValueError: that is no process group, or this process is not in it.
    """
    if process_group is None:
        return Alone()
    from ma_client.torch.groups import roles  # not above: torch's sharding takes a second to import

    return roles.role_in(process_group)
