"""The directory in which a server keeps its center: opened or created, and locked against other servers."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from ps_server.checkpoints import files

__all__ = ["CheckpointHome"]


class CheckpointHome:
    """An open directory, its lock, and a guard.

    The lock is a file in the directory, so removing the directory removes the lock. The guard is the name of a socket.
    The kernel gives that name to one process of this machine (exactly: of its network namespace) and frees it when the
    process ends. While the server runs, no other server can use a directory of this name, even after it was removed.

    Args:
        directory: created if it does not exist, accessible to this user only.

    Raises:
        BlockingIOError: another server keeps its center there.
        OSError: the directory cannot be used.

    Attributes:
        directory: as given.
        path: absolute, in the system's encoding.
        descriptor: of the open directory; keeps its number when the directory is created again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        absolute = Path(os.path.abspath(directory))
        self.path = os.fsencode(absolute)
        exists = os.path.isdir(absolute)  # creating an existing directory may hang with its disk
        if not exists:
            absolute.parent.mkdir(parents=True, exist_ok=True)
        self._guard = _guard_of(absolute)
        try:
            if not exists:
                with suppress(FileExistsError):  # opening it reports what it is
                    os.mkdir(absolute, 0o700)
            self.descriptor = files.open_directory(absolute)
            try:
                self._lock = files.take_lock(self.descriptor)
            except BaseException:
                os.close(self.descriptor)
                raise
        except BaseException:
            self._close_guard()
            raise

    def move(self, directory: int, lock: int) -> None:
        """The directory was removed and created again: these descriptors of it and of its lock replace the old ones,
        under the same numbers."""
        try:
            os.dup2(directory, self.descriptor, inheritable=False)
            os.dup2(lock, self._lock, inheritable=False)
        finally:
            os.close(directory)
            os.close(lock)

    def close(self) -> None:
        """Releases the directory."""
        os.close(self._lock)
        os.close(self.descriptor)
        self._close_guard()

    def _close_guard(self) -> None:
        if self._guard is not None:
            self._guard.close()


def _guard_of(path: Path) -> socket.socket | None:
    """A socket that excludes other servers until it is closed; None on systems without such names. Raises
    BlockingIOError."""
    if sys.platform != "linux":
        return None
    real = Path(os.path.realpath(path))
    parent = os.stat(real.parent)
    # Every user of the machine can read the name, so it must not reveal the path.
    name = hashlib.sha256(b"%d %d " % (parent.st_dev, parent.st_ino) + os.fsencode(real.name)).hexdigest()
    guard = socket.socket(socket.AF_UNIX)
    try:
        guard.bind(f"\0modelaverage-checkpoints-{name}")
    except OSError as error:
        guard.close()
        if error.errno == errno.EADDRINUSE:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from None
        return None  # not possible on this system; the lock remains
    return guard
