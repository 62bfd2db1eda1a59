"""Descriptors that are held back for the server's own needs: its files and segments, never somebody's connection."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Reserve"]

_T = TypeVar("_T")
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


class Reserve:
    """Descriptors that point at nothing, until one is needed. For any thread.

    Connections come in without asking: strangers can take every descriptor that the process may have. These they cannot
    take, and `open` gives one up for something that the server needs.

    Args:
        size: how many to hold; 0: none, for tests.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[int] = []
        self._lock = threading.RLock()  # large centers are not made on the event loop
        self.refill()

    @property
    def is_short(self) -> bool:
        """Whether the system has no descriptors to fill it up again: calls that would need some had better wait."""
        return len(self._held) < self._size and not self.refill()

    def open(self, make: Callable[[], _T]) -> _T:
        """What ``make`` returns, which needs a descriptor or two.

        Raises:
            OSError: EMFILE or ENFILE, if the reserve is used up, or whatever else ``make`` raises.
        """
        with self._lock:
            while True:
                try:
                    made = make()
                except OSError as error:
                    if error.errno not in _EXHAUSTED or not self._held:
                        raise
                    os.close(self._held.pop())
                else:
                    self.refill()
                    return made

    def refill(self) -> bool:
        """Takes back what was given up, as far as there is any; whether it is full."""
        with self._lock:
            try:
                while len(self._held) < self._size:
                    self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return False
            return True

    def close(self) -> None:
        """Gives everything up."""
        while self._held:
            os.close(self._held.pop())
