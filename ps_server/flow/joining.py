"""Calls of processes that hold a task index or wait for one."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.flow.call import Call
from ps_server.rules.task_indexes import TaskIndexes

__all__ = ["Joining"]

_MADE_FROM_INDEX = re.compile(r"worker-(0|[1-9][0-9]{0,8})")


class Joining:
    """Hands out the task indexes of a job.

    Args:
        num_workers: how many indexes there are.
        indexes: assigns them.
        clock: seconds, monotonic.
    """

    def __init__(self, num_workers: int, indexes: TaskIndexes, clock: Callable[[], float]) -> None:
        self._num_workers = num_workers
        self._indexes = indexes
        self._clock = clock
        self._calls: dict[bytes, Call] = {}
        self._waiting: dict[asyncio.Event, None] = {}  # an ordered set: the longest wait is served first

    async def serve(self, call: Call, request: pb.JoinRequest) -> None:
        """Serves one call until the client, a newer call of the same process or `fail` ends it.

        Raises:
            ConflictError: ROUND_FULL, the job has no such index.
        """
        process = request.incarnation
        wanted = request.task_index if request.HasField("task_index") else None
        if wanted is not None and wanted >= self._num_workers:
            raise refusal(
                Reason.ROUND_FULL,
                f"there is no worker {wanted}: the server was told --num-workers {self._num_workers}; give that number",
            )
        earlier = self._calls.get(process)
        if earlier is not None:
            earlier.fail(refusal(Reason.PUSH_SUPERSEDED, "a newer call of the same process has joined in its place"))
        self._calls[process] = call
        try:
            index = await self._index(call, process, wanted)
            await self._say(call, index)
            await asyncio.Event().wait()  # never set; the end of the call cancels this
        finally:
            if self._calls.get(process) is call:
                del self._calls[process]
            self._indexes.ended(process, call.number, self._clock())
            self._wake()

    def heard(self, worker_id: str) -> None:
        """A worker trains: if its id has an index, no process gets that index until the worker is gone."""
        index = _index_in(worker_id)
        if index is not None:
            self._indexes.heard(index, self._clock())

    def leave(self, worker_id: str, process: bytes) -> None:
        """The process of a worker has finished, or has said goodbye: its index is free."""
        self._indexes.leave(process)
        index = _index_in(worker_id)
        if index is not None:
            self._indexes.gone(index)
        self._wake()

    def fail(self, error: ModelAverageError) -> None:
        """Ends all calls; they would not end by themselves."""
        for call in self._calls.values():
            call.fail(error)

    async def _index(self, call: Call, process: bytes, wanted: int | None) -> int:
        was_told = False
        while (index := self._indexes.take(process, call.number, wanted, self._clock())) is None:
            if was_told:
                await self._change()
            else:  # then check again: the state may have changed
                await self._say(call, None)
                was_told = True
        return index

    async def _say(self, call: Call, index: int | None) -> None:
        response = pb.JoinResponse(task_index=index, num_workers=self._num_workers)
        await call.write(response.SerializeToString())

    async def _change(self) -> None:
        """Waits until an index may have become free."""
        changed = asyncio.Event()
        self._waiting[changed] = None
        now_s = self._clock()
        due_at_s = self._indexes.due_at_s(now_s)
        try:
            await asyncio.wait_for(changed.wait(), None if math.isinf(due_at_s) else max(0.0, due_at_s - now_s))
        except asyncio.TimeoutError:
            pass
        finally:
            del self._waiting[changed]

    def _wake(self) -> None:
        for changed in self._waiting:
            changed.set()


def _index_in(worker_id: str) -> int | None:
    """The index of a worker whose id was made from it, as clients do; None: its id has another form."""
    found = _MADE_FROM_INDEX.fullmatch(worker_id)
    return None if found is None else int(found[1])
