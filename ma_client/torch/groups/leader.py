"""Rank 0 of a worker group: it makes the worker's rounds, and calls the other ranks to take part."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from ma_client.cluster.resolvers import NUM_WORKERS, PS_HOSTS, TASK_INDEX, WORKER_PER, index_of_a_process
from ma_client.cluster.settings import ClusterError
from ma_client.session import ParameterServerSession
from ma_client.torch.custom_getter import ModelAverageCustomGetter
from ma_client.torch.groups.calls import (
    GroupCall,
    GroupDone,
    GroupFailed,
    GroupWaiting,
    RankResult,
    Standing,
    result_of,
    sendable,
)
from ma_client.torch.groups.led_training import LedTraining
from ma_client.torch.groups.mirror import GroupMirror
from ma_client.torch.groups.worker_group import WorkerGroup
from ma_client.torch.local_state import ParameterState
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.training.parts import WorkerParts, solo_training
from ma_client.torch.weighing import Weight
from modelaverage.logs import event

__all__ = ["Leader"]

# Ranks of torch.distributed give up a wait after minutes (gloo 30, NCCL 10); a round may take longer.
_SIGN_OF_LIFE_S = 20.0

_log = logging.getLogger("ma_client")
_T = TypeVar("_T")


class Leader:
    """Leads the group; see `WorkerRole`.

    Args:
        group: the ranks.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self.ranks = frozenset(group.ranks)
        self._group = group
        # Held while the ranks exchange something, so that no sign of life comes between.
        self._exchange = threading.Lock()
        # Whether rank 0 has failed in the midst of an exchange. The others wait there, until this process ends.
        self._is_apart = False

    def check(self, getter: ModelAverageCustomGetter) -> None:
        """See `WorkerRole`. A group takes every model that its getter takes."""

    def settings(self, read: Callable[[], OptimizerSettings]) -> OptimizerSettings:
        """See `WorkerRole`."""
        return self.lead(read, lambda settings: GroupDone(value=settings))

    def mirror(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> _LedMirror:
        """See `WorkerRole`."""
        return _LedMirror(self, GroupMirror(self._group, model, tensors))

    def weight(self, weight: Weight) -> Weight:
        """See `WorkerRole`. Of a function, the sum over the ranks; of a number, that number."""
        if not callable(weight):
            return weight
        count = weight
        return lambda: sum(self.ask(GroupCall("count"), count))

    def state(self, state: ParameterState) -> ParameterState:
        """See `WorkerRole`."""
        return _StateOfRanks(self, state)

    def training(self, parts: WorkerParts, session: ParameterServerSession | None) -> LedTraining:
        """See `WorkerRole`."""

        def made() -> LedTraining:
            if session is None:
                self._check_index()
            own = solo_training(parts, session)
            return LedTraining(own, parts.progress, self.lead, lambda: self._compare(parts.variables))

        return self.lead(made, lambda training: GroupDone(training.standing()))

    def lead(
        self,
        work: Callable[[], _T],
        done: Callable[[_T], GroupDone],
        standing: Callable[[], Standing | None] = lambda: None,
    ) -> _T:
        """Does something for which the other ranks have come together. They take part as they are called, and hear how
        it ended.

        Args:
            work: what rank 0 does.
            done: what to tell the others about its result.
            standing: where the worker is if it fails.
        """
        try:
            with self._signs_of_life():
                found = work()
            answer = done(found)
        except BaseException as error:
            if not self._is_apart:
                with contextlib.suppress(RuntimeError):  # a rank has died; torch says so to those that are left
                    self._tell(GroupFailed(sendable(error, 0), standing()))
            raise
        self._tell(answer)
        return found

    @contextmanager
    def calling(self, call: GroupCall, own: Callable[[], Any] = lambda: None) -> Iterator[list[Any]]:
        """Lets all ranks do what this call is for. The context gets their results by rank; what is exchanged in it is
        part of the call.

        Args:
            call: what to do.
            own: what rank 0 does for it.

        Raises:
            Exception: the first error of a rank; all ranks then leave the rest of the call undone.
        """
        with self._exchange:
            self._group.told(call)
            results: list[RankResult] = self._group.collected(result_of(own, 0))
            for result in results:
                if result.error is not None:
                    raise result.error
            self._is_apart = True
            yield [result.value for result in results]
            self._is_apart = False

    def ask(self, call: GroupCall, own: Callable[[], Any]) -> list[Any]:
        """Like `calling`, for calls that end with the results."""
        with self.calling(call, own) as results:
            return results

    def _check_index(self) -> None:
        """Raises ClusterError if the environment gives each rank an index of its own."""
        source = index_of_a_process(os.environ)
        if source is not None and len(self.ranks) > 1:
            raise ClusterError(
                f"{source} is the index of one process, but the {len(self.ranks)} ranks of the process_group are one "
                f"worker: set {TASK_INDEX} to the worker's index, the same for all its ranks, with {NUM_WORKERS} and "
                f"{PS_HOSTS}; or {WORKER_PER}=node if each node is a worker (docs/groups.md)"
            )

    def _compare(self, variables: LocalVariables) -> None:
        """Warns if the ranks have trained models of their own."""
        mirror = variables.mirror()
        assert isinstance(mirror, _LedMirror)  # as `mirror` makes it
        digests = self.ask(GroupCall("digest"), mirror.digest)
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            _log.warning(
                "rank %d of the worker group has other parameters than rank 0: only those of rank 0 are averaged, and "
                "what the others have trained is lost. Wrap the model in DistributedDataParallel or FSDP, within the "
                "group: docs/groups.md",
                others[0],
                extra=event("ranks_differ", ranks=others[:10]),
            )

    def _tell(self, message: object) -> None:
        with self._exchange:
            self._group.told(message)

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        is_over = threading.Event()

        def give() -> None:
            with contextlib.suppress(RuntimeError):  # a rank has died; the leader's next message meets the same
                while not is_over.wait(_SIGN_OF_LIFE_S):
                    self._tell(GroupWaiting())

        thread = threading.Thread(target=give, name="worker-group", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


class _LedMirror:
    """The model's host arrays, for which all ranks are called. `Mirror` describes the methods.

    Args:
        leader: calls.
        mirror: of rank 0.
    """

    def __init__(self, leader: Leader, mirror: GroupMirror) -> None:
        self._leader = leader
        self._mirror = mirror
        self.names = mirror.names
        self.digest = mirror.digest

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._mirror.follow(tensors)

    def gather(self) -> dict[str, NDArray[Any]]:
        with self._leader.calling(GroupCall("gather", (self._mirror.fingerprint,))):
            return self._mirror.gather()

    def scatter(self, arrays: Mapping[str, NDArray[Any]], skip: Collection[str] = ()) -> None:
        with self._leader.calling(GroupCall("scatter", (self._mirror.fingerprint, frozenset(skip)))):
            self._mirror.scatter(arrays, skip)


class _StateOfRanks:
    """The local optimizer's state of a parameter, of which each rank may have a part. `ParameterState` describes the
    methods.

    Args:
        leader: calls.
        own: the state in rank 0.
    """

    def __init__(self, leader: Leader, own: ParameterState) -> None:
        self._leader = leader
        self._own = own

    def spoilt(self) -> list[str]:
        found = self._leader.ask(GroupCall("spoilt"), self._own.spoilt)
        return list(dict.fromkeys(name for names in found for name in names))

    def drop(self, names: Collection[str]) -> None:
        self._leader.ask(GroupCall("drop", (frozenset(names),)), lambda: self._own.drop(names))
