"""What files say, read again when they change: certificates and tokens are renewed while a process runs."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from modelaverage.errors import SecurityError

__all__ = ["WatchedFiles"]

_T = TypeVar("_T")
# The coarsest clock of a file system in use. A file that changed more recently may change again and look the same.
_CLOCK_TICK_NS = 2_000_000_000


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
        self._seen = [_Look.at(path) for path in self._paths]
        self._value = read()

    def get(self) -> _T:
        """What they say now."""
        self.news()
        return self._value

    def news(self) -> _T | None:
        """What they say now if that has changed since the last look; None if it has not."""
        with self._lock:
            # Before they are read: what is written to them afterwards is seen at the next look.
            looks = [_Look.at(path, before) for path, before in zip(self._paths, self._seen, strict=True)]
            seen, self._seen = self._seen, looks
            if [look.content for look in looks] == [look.content for look in seen]:
                return None
            try:
                self._value = self._read()
            except SecurityError as error:
                self._on_problem(error)
                return None
            return self._value


@dataclass(frozen=True)
class _Look:
    """What a file looked like.

    Args:
        stamp: what changes with the file; empty if there is none.
        is_settled: whether every later change gives another stamp.
        content: stands for its bytes; empty if they cannot be read.
    """

    stamp: tuple[int, ...]
    is_settled: bool
    content: bytes

    @classmethod
    def at(cls, path: Path, before: _Look | None = None) -> _Look:
        """The file as it is now; its bytes are read only if they may be others than before."""
        try:
            status = os.stat(path)
        except OSError:
            return cls((), False, b"")
        # The time of the last change is the system's own: nobody can put it back, as the time of the last write can be.
        stamp = status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size
        if before is not None and before.is_settled and stamp == before.stamp:
            return before
        if not stat.S_ISREG(status.st_mode):  # a pipe can be read only once
            return cls(stamp, True, repr(stamp[:2]).encode())
        is_settled = time.time_ns() - status.st_ctime_ns > _CLOCK_TICK_NS
        try:
            return cls(stamp, is_settled, hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            return cls(stamp, is_settled, b"")
