"""Where the threads of all servers wait for each other."""

from __future__ import annotations

import threading

__all__ = ["Meeting"]


class Meeting:
    """Over when all are present at the same time.

    Args:
        size: how many there are.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._present: set[int] = set()
        self._condition = threading.Condition()
        self._over = False

    def join(self, index: int, timeout_s: float) -> bool:
        """Whether all are there, or it is over, within this time."""
        with self._condition:
            self._present.add(index)
            if len(self._present) == self._size:
                self.end()
            return self._condition.wait_for(lambda: self._over, timeout_s)

    def leave(self, index: int) -> None:
        """Not there any more."""
        with self._condition:
            self._present.discard(index)

    def end(self) -> None:
        """Nobody waits any longer."""
        with self._condition:
            self._over = True
            self._condition.notify_all()
