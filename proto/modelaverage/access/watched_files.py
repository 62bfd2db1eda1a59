"""Reads files again when they change, so that certificates and tokens can be renewed while a process runs."""

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
# The coarsest clock of a file system in use. A file that changed more recently may change again with the same time.
_CLOCK_TICK_NS = 2_000_000_000


class WatchedFiles(Generic[_T]):
    """The content of a group of files. Safe for any thread.

    Args:
        paths: the files; links are followed, so that replacing a mounted secret counts as a change.
        read: reads them; raises SecurityError if they are unusable.
        on_problem: called with the error when changed files are unusable, once for each change; the last usable content
            stays in force.

    Raises:
        SecurityError: the files are unusable at the start.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], _T], on_problem: Callable[[SecurityError], None]
    ) -> None:
        self._paths, self._read, self._on_problem = tuple(paths), read, on_problem
        self._lock = threading.Lock()
        self._seen = [_Look.at(path) for path in self._paths]
        self._value = read()

    def get(self) -> _T:
        """The current content."""
        self.news()
        return self._value

    def news(self) -> _T | None:
        """The current content if it has changed since the last look, otherwise None."""
        with self._lock:
            # Taken before the files are read, so that the next look notices what is written to them meanwhile.
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
    """The state of a file at one moment.

    Args:
        stamp: changes with the file; empty if there is no file.
        is_settled: whether every later change gives another stamp.
        content: a digest of its bytes; empty if they cannot be read.
    """

    stamp: tuple[int, ...]
    is_settled: bool
    content: bytes

    @classmethod
    def at(cls, path: Path, before: _Look | None = None) -> _Look:
        """The file's present state; its bytes are read only if they may have changed."""
        try:
            status = os.stat(path)
        except OSError:
            return cls((), False, b"")
        # The system sets the time of the last status change; unlike that of the last write, no program can set it back.
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
