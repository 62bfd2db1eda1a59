"""Assigns task indexes to processes. Pure: no I/O; the time is an argument, in seconds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

__all__ = ["DEFAULT_REJOIN_TIMEOUT_S", "TaskIndexes"]

# A client reconnects within a second; an operator who restarts a worker takes longer than this.
DEFAULT_REJOIN_TIMEOUT_S = 5.0


@dataclass
class _Holder:
    """A process that has an index, and the call that holds it or the time until which it is reserved."""

    index: int
    call: int
    free_at_s: float = math.inf


class TaskIndexes:
    """The indexes 0 to ``num_workers`` - 1, each held by one process at most. A process has one index at most.

    A worker that was started with an index never asks for it. Its calls show that the index is in use; no process gets
    that index, unless it names it, until the worker has said goodbye.

    Args:
        num_workers: how many indexes there are.
        rejoin_timeout_s: how long an index stays reserved for a process whose call has ended.
        closed_until_s: until then a process gets an index only by naming it. After a restart of the server, this lets
            processes reclaim the indexes that they had.
    """

    def __init__(self, num_workers: int, rejoin_timeout_s: float, closed_until_s: float = -math.inf) -> None:
        self._num_workers = num_workers
        self._rejoin_timeout_s = rejoin_timeout_s
        self._closed_until_s = closed_until_s
        self._holders: dict[bytes, _Holder] = {}
        self._processes: dict[int, bytes] = {}  # that hold the indexes
        self._in_use = set[int]()  # by workers that hold none

    def take(self, process: bytes, call: int, wanted: int | None, now_s: float) -> int | None:
        """Assigns an index to the process, held by this call. Returns None if the process must wait.

        Args:
            process: its incarnation.
            call: the number of its call, which replaces an earlier call of the same process.
            wanted: the only index that the process can use; None: the lowest that is free.
            now_s: the time.
        """
        self._expire(now_s)
        holder = self._holders.get(process)
        if holder is None:
            if wanted is None:
                taken = self._processes.keys() | self._in_use
                index = next(index for index in itertools.count() if index not in taken)
                if index >= self._num_workers or now_s < self._closed_until_s:
                    return None
            elif wanted in self._processes:
                return None
            else:
                index = wanted
            holder = self._holders[process] = _Holder(index, call)
            self._processes[index] = process
            self._in_use.discard(index)
        holder.call, holder.free_at_s = call, math.inf
        return holder.index

    def ended(self, process: bytes, call: int, now_s: float) -> None:
        """A call has ended without a goodbye. If it held the index, the index stays reserved for a while."""
        holder = self._holders.get(process)
        if holder is not None and holder.call == call:
            holder.free_at_s = now_s + self._rejoin_timeout_s

    def leave(self, process: bytes) -> None:
        """The process has said goodbye."""
        holder = self._holders.pop(process, None)
        if holder is not None:
            del self._processes[holder.index]

    def heard(self, index: int, now_s: float) -> None:
        """A worker with this index trains."""
        process = self._processes.get(index)
        if process is not None and self._holders[process].free_at_s <= now_s:
            self._expire(now_s)
        if index < self._num_workers and index not in self._processes:
            self._in_use.add(index)

    def gone(self, index: int) -> None:
        """The worker with this index has finished, or has said goodbye."""
        self._in_use.discard(index)

    def due_at_s(self, now_s: float) -> float:
        """When an index may become free by the passing of time alone; infinite: never."""
        times_s = [holder.free_at_s for holder in self._holders.values()]
        if now_s < self._closed_until_s:
            times_s.append(self._closed_until_s)
        return min(times_s, default=math.inf)

    def _expire(self, now_s: float) -> None:
        for process in [p for p, holder in self._holders.items() if holder.free_at_s <= now_s]:
            self.leave(process)
