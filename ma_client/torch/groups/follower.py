"""A rank of a worker group other than 0: it does what rank 0 calls for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ma_client.session import ParameterServerSession
from ma_client.torch.custom_getter import ModelAverageCustomGetter
from ma_client.torch.groups.calls import GroupCall, GroupDone, GroupFailed, result_of
from ma_client.torch.groups.following import FollowingTraining
from ma_client.torch.groups.mirror import GroupMirror
from ma_client.torch.groups.worker_group import WorkerGroup
from ma_client.torch.local_state import ParameterState
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.training.parts import WorkerParts
from ma_client.torch.weighing import Weight
from modelaverage.errors import ConflictError, Reason

__all__ = ["Follower"]


@dataclass(frozen=True)
class _Answer:
    """What this rank does for a call.

    Args:
        alone: returns its result.
        together: exchanges something with the other ranks, if all of them could do their part alone.
    """

    alone: Callable[..., Any]
    together: Callable[..., None] | None = None


class Follower:
    """Follows rank 0; see `WorkerRole`.

    Args:
        group: the ranks.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self.ranks = frozenset(group.ranks)
        self._group = group
        self._answers: dict[str, _Answer] = {}

    def check(self, getter: ModelAverageCustomGetter) -> None:
        """See `WorkerRole`. A group takes every model that its getter takes."""

    def settings(self, read: Callable[[], OptimizerSettings]) -> OptimizerSettings:  # noqa: ARG002
        """See `WorkerRole`."""
        settings: OptimizerSettings = self._followed().value
        return settings

    def mirror(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> GroupMirror:
        """See `WorkerRole`."""
        return GroupMirror(self._group, model, tensors)

    def weight(self, weight: Weight) -> Weight:
        """See `WorkerRole`."""
        self._answers["count"] = _Answer(weight if callable(weight) else lambda: 0.0)
        return weight

    def state(self, state: ParameterState) -> ParameterState:
        """See `WorkerRole`."""
        self._answers["spoilt"] = _Answer(state.spoilt)
        self._answers["drop"] = _Answer(state.drop)
        return state

    def training(self, parts: WorkerParts, session: ParameterServerSession | None) -> FollowingTraining:
        """See `WorkerRole`.

        Raises:
            ValueError: this rank was given a session.
        """
        model = _Model(parts.variables, self._group.rank)
        self._answers["gather"] = _Answer(model.check, model.gather)
        self._answers["digest"] = _Answer(model.digest)
        self._answers["scatter"] = _Answer(model.check, model.scatter)
        standing = self._followed().standing
        assert standing is not None  # as `Leader.training` answers
        if session is not None:
            raise ValueError(
                f"rank {self._group.rank} of the worker group was given a session, but only rank 0 talks to the "
                "servers; give it there alone"
            )
        return FollowingTraining(self.follow, self._group.rank, parts, standing)

    def follow(self) -> GroupDone | GroupFailed:
        """Does what rank 0 calls for, until it says how that has ended.

        Raises:
            RuntimeError: a rank has died, as torch says it.
        """
        while True:
            said = self._group.told()
            if isinstance(said, GroupCall):
                self._take_part(said)
            elif isinstance(said, (GroupDone, GroupFailed)):
                return said

    def _followed(self) -> GroupDone:
        said = self.follow()
        if isinstance(said, GroupFailed):
            raise said.error
        return said

    def _take_part(self, call: GroupCall) -> None:
        answer = self._answers[call.name]
        own = result_of(lambda: answer.alone(*call.arguments), self._group.rank)
        results = self._group.collected(own)
        if answer.together is not None and all(result.error is None for result in results):
            answer.together(*call.arguments)


class _Model:
    """This rank's part of the model.

    Args:
        variables: its center variables.
        rank: in the group.
    """

    def __init__(self, variables: LocalVariables, rank: int) -> None:
        self._variables = variables
        self._rank = rank

    def check(self, fingerprint: str, skip: Collection[str] = ()) -> None:  # noqa: ARG002
        """Raises ConflictError if rank 0 has other variables."""
        mirror = self._mirror()
        if mirror.fingerprint != fingerprint:
            raise ConflictError(
                f"its model has other center variables than that of rank 0, or others in shape or element type; it has "
                f"{len(mirror.names)}, of which the first is {next(iter(mirror.names), 'none')!r}",
                Reason.MANIFEST_MISMATCH,
            )

    def digest(self) -> int:
        """See `GroupMirror.digest`."""
        return self._mirror().digest()

    def gather(self, fingerprint: str) -> None:  # noqa: ARG002
        """Gives this rank's part to rank 0."""
        self._mirror().gather()

    def scatter(self, fingerprint: str, skip: Collection[str]) -> None:  # noqa: ARG002
        """Takes what rank 0 has."""
        self._variables.install({}, skip)

    def _mirror(self) -> GroupMirror:
        mirror = self._variables.mirror()
        assert isinstance(mirror, GroupMirror)  # as `Follower.mirror` makes it
        return mirror
