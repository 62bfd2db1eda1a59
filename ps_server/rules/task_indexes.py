"""Which process has which task index: the rules, without I/O. Time is an argument, in seconds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

__all__ = ["DEFAULT_REJOIN_TIMEOUT_S", "TaskIndexes"]

# Longer than a client needs to find a server again (a second), shorter than anybody who restarts a worker waits.
DEFAULT_REJOIN_TIMEOUT_S = 5.0


@dataclass
class _Holder:
    """A process that has an index: through which of its calls, or until when without one."""

    index: int
    call: int
    free_at_s: float = math.inf


class TaskIndexes:
    """The indexes 0 to ``num_workers`` - 1, each with one process at most. A process has one index at most.

    Args:
        num_workers: how many there are.
        rejoin_timeout_s: how long an index is kept for a process whose call has ended.
        closed_until_s: until then nobody gets an index that it does not name: after a restart of the server, those who
            have had one come back first.
    """

    def __init__(self, num_workers: int, rejoin_timeout_s: float, closed_until_s: float = -math.inf) -> None:
        self._num_workers = num_workers
        self._rejoin_timeout_s = rejoin_timeout_s
        self._closed_until_s = closed_until_s
        self._holders: dict[bytes, _Holder] = {}

    def take(self, process: bytes, call: int, wanted: int | None, now_s: float) -> int | None:
        """The index that the process has from now on, through this call; None: it has to wait.

        Args:
            process: its incarnation.
            call: the number of its call; an earlier call of the same process no longer counts.
            wanted: the only index that it can use; None: the lowest that is free.
            now_s: the time.
        """
        self._expire(now_s)
        holder = self._holders.get(process)
        if holder is None:
            taken = {other.index for other in self._holders.values()}
            if wanted is None:
                index = next(index for index in itertools.count() if index not in taken)
                if index >= self._num_workers or now_s < self._closed_until_s:
                    return None
            elif wanted in taken:
                return None
            else:
                index = wanted
            holder = self._holders[process] = _Holder(index, call)
        holder.call, holder.free_at_s = call, math.inf
        return holder.index

    def ended(self, process: bytes, call: int, now_s: float) -> None:
        """A call has ended without a goodbye: if the process has its index through it, it may come back for it."""
        holder = self._holders.get(process)
        if holder is not None and holder.call == call:
            holder.free_at_s = now_s + self._rejoin_timeout_s

    def leave(self, process: bytes) -> None:
        """The process has said goodbye."""
        self._holders.pop(process, None)

    def due_at_s(self, now_s: float) -> float:
        """When somebody who waits may get an index by the passing of time alone; infinite: not at all."""
        times_s = [holder.free_at_s for holder in self._holders.values()]
        if now_s < self._closed_until_s:
            times_s.append(self._closed_until_s)
        return min(times_s, default=math.inf)

    def _expire(self, now_s: float) -> None:
        for process in [p for p, holder in self._holders.items() if holder.free_at_s <= now_s]:
            del self._holders[process]
