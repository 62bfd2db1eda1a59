"""Writes a run's metrics.jsonl. If the disk is full, lines are lost, but the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

__all__ = ["MetricsFile"]


class MetricsFile:
    """A file of whole lines.

    Args:
        path: of the file, which is created.
        say: called once when lines begin to be lost, and with their number when lines can be written again.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file = path.open("wb", buffering=0)
        self._size_bytes = self._lost = 0

    def write(self, line: str) -> None:
        """Appends a line and a newline; writes all of it or nothing."""
        data = f"{line}\n".encode()
        try:
            rest = data
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self._file.truncate(self._size_bytes)
            self._file.seek(self._size_bytes)
            if not self._lost:
                self._say(f"cannot write {self._path}: {error.strerror or error}; the run goes on without its lines")
            self._lost += 1
            return
        self._size_bytes += len(data)
        if self._lost:
            self._say(f"{self._path} can be written again; {self._lost:,} lines of it are lost")
            self._lost = 0

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
