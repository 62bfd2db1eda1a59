"""What files say, read again when they change: certificates and tokens are renewed while a process runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from modelaverage.errors import SecurityError

__all__ = ["WatchedFiles"]

_T = TypeVar("_T")
_Signature = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[_T]):
    """What some files say together. For any thread.

    Args:
        paths: the files; links are followed, so that a mounted secret that is exchanged counts as changed.
        read: reads them; raises SecurityError if they are unusable.
        on_problem: gets the error when changed files are unusable, once for each change; what they said before stays.

    Raises:
        SecurityError: they are unusable from the start.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], _T], on_problem: Callable[[SecurityError], None]
    ) -> None:
        self._paths, self._read, self._on_problem = tuple(paths), read, on_problem
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = read()

    def get(self) -> _T:
        """What they say now."""
        self.news()
        return self._value

    def news(self) -> _T | None:
        """What they say now if that has changed since the last look; None if it has not."""
        with self._lock:
            # Before they are read: what is written to them afterwards is seen at the next look.
            signature = self._signature()
            if signature == self._seen:
                return None
            self._seen = signature
            try:
                self._value = self._read()
            except SecurityError as error:
                self._on_problem(error)
                return None
            return self._value

    def _signature(self) -> _Signature:
        return tuple(_signature_of(path) for path in self._paths)


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
