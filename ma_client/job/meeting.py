"""A barrier at which the threads of all servers wait for each other."""

from __future__ import annotations

import threading

__all__ = ["Meeting"]


class Meeting:
    """A barrier that opens when all threads are present at the same time.

    Args:
        size: the number of threads.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._present: set[int] = set()
        self._condition = threading.Condition()
        self._over = False

    def join(self, index: int, timeout_s: float) -> bool:
        """Waits up to this time. Returns whether the barrier has opened or ended."""
        with self._condition:
            self._present.add(index)
            if len(self._present) == self._size:
                self.end()
            return self._condition.wait_for(lambda: self._over, timeout_s)

    def leave(self, index: int) -> None:
        """Marks a thread as absent."""
        with self._condition:
            self._present.discard(index)

    def end(self) -> None:
        """Ends all waits."""
        with self._condition:
            self._over = True
            self._condition.notify_all()
