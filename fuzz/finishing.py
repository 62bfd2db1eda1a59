"""Observes which workers finish, and checks that rounds continue without these and no others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection

from fuzz.context import ClientCall, Failure
from fuzz.world import World
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy

__all__ = ["Finishing"]


class Finishing:
    """The workers that have finished at one server.

    It may list too many workers (a goodbye does not count while another process of that name pushes), but never too
    few.

    Args:
        world: the server.
        policy: whom its rounds wait for.
        endings: where to count the ends of jobs.
    """

    def __init__(self, world: World, policy: RoundPolicy, endings: Counter[str]) -> None:
        self._world = world
        self._policy = policy
        self._endings = endings
        self._numbers = itertools.count()
        self._finished: dict[str, int] = {}  # when each said so
        self._processes: dict[str, set[bytes]] = {}  # of each, that have said so
        self._goodbyes: dict[ClientCall, pb.LeaveRequest] = {}
        self._returns: dict[ClientCall, tuple[str, int]] = {}
        self._absent = set[str]()  # since the last commit
        self._was_over = False

    def left(self, call: ClientCall, request: pb.LeaveRequest) -> None:
        """A worker says goodbye."""
        if request.finished and self._world.job is not None:
            self._finished[request.worker_id] = next(self._numbers)
            self._processes.setdefault(request.worker_id, set()).add(request.incarnation)
            self._goodbyes[call] = request

    def returned(self, call: ClientCall, worker_id: str) -> None:
        """A worker pushes, or pulls to train: if the call is admitted, the worker counts again."""
        self._returns[call] = worker_id, next(self._numbers)

    def least(self, contributors: Collection[str]) -> int:
        """The least number of workers that the round that has just committed needs. To be called before `check`."""
        job = self._world.job
        assert job is not None
        absent = (self._absent | job.round.finished).difference(contributors)
        return min(self._policy.min_workers, max(1, self._policy.num_workers - len(absent)))

    def check(self, has_committed: bool) -> None:
        """Raises Failure if the round does not wait for a present worker, or waits for a finished one.

        Args:
            has_committed: whether a round has committed since the last check.
        """
        job = self._world.job
        if job is None:
            return
        if has_committed:
            self._absent.clear()
        self._absent |= job.round.finished
        self._hear_returns()
        self._hear_goodbyes()
        if others := job.round.finished - self._finished.keys():
            raise Failure(f"no round waits for {others}, and they train")
        for worker_id in job.round.finished & job.round._entries.keys():
            attached = job.round._entries[worker_id].attached
            if attached is not None and attached.incarnation not in self._processes[worker_id]:
                raise Failure(f"{worker_id!r} has finished by the word of a process that is not the one that pushes")
        self._check_waits_rightly()
        self._endings["(job over)"] += job.round.job_is_over and not self._was_over
        self._was_over = job.round.job_is_over

    def _hear_returns(self) -> None:
        for call, (worker_id, number) in list(self._returns.items()):
            # A pull is admitted when it gets its header; only notices come before.
            is_in = bool(call.context.written) if call.rpc == "PushAndAverage" else call.done and call.completed
            if is_in and number > self._finished.get(worker_id, number):
                del self._finished[worker_id], self._processes[worker_id]
            if is_in or call.done:
                del self._returns[call]

    def _hear_goodbyes(self) -> None:
        job = self._world.job
        assert job is not None
        for call, request in self._goodbyes.items():
            if call.done and call.completed:
                entry = job.round._entries.get(request.worker_id)
                attached = None if entry is None else entry.attached
                by_another = attached is not None and attached.incarnation != request.incarnation
                if request.worker_id not in job.round.finished and not by_another:
                    raise Failure(f"{request.worker_id!r} has finished, and rounds wait for it")
                pb.LeaveResponse.FromString(call.response)
        self._goodbyes.clear()  # without a disk, the answer comes at once or never

    def _check_waits_rightly(self) -> None:
        """A round whose pushes are whole commits, unless an unfinished worker is missing."""
        job, policy = self._world.job, self._policy
        assert job is not None
        present = job.round._entries.keys()
        absent = job.round.finished - present
        least = min(policy.min_workers, max(1, policy.num_workers - len(absent)))
        if policy.is_strict and job.round.complete == present and len(present) >= least:
            raise Failure(f"a round waits for nobody: {present} are there, {absent} have finished")
