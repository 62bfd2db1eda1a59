"""Descriptors that are reserved for the server's own files and segments, so that connections cannot take them."""

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
    """Holds unused descriptors until one is needed. Safe for any thread.

    gRPC accepts any connection, so strangers can use up the process's descriptors. They cannot use these: `open` gives
    one up for something that the server needs.

    Args:
        size: how many to hold; 0: none, for tests.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[int] = []
        self._lock = threading.RLock()  # large centers are created outside the event loop
        self.refill()

    @property
    def is_short(self) -> bool:
        """Whether the system has no descriptors to refill it; calls that need some should wait."""
        return len(self._held) < self._size and not self.refill()

    def open(self, make: Callable[[], _T]) -> _T:
        """Calls ``make``, which needs a descriptor or two, and returns its result.

        Raises:
            OSError: EMFILE or ENFILE if the reserve is used up, or what ``make`` raises.
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
        """Refills the reserve as far as the system allows; returns whether it is full."""
        with self._lock:
            try:
                while len(self._held) < self._size:
                    self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return False
            return True

    def close(self) -> None:
        """Closes all descriptors."""
        while self._held:
            os.close(self._held.pop())
