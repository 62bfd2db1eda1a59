"""The directory that a server keeps its center in: found or made, and no other server's while this one runs."""

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

    The lock is in the directory, so it goes with it. The guard is a socket's name that the kernel gives to one process
    of this machine (of its network namespace, to be exact), and takes back when that ends: while the server runs,
    nobody else gets a directory of this name, though it was removed.

    Args:
        directory: made if it does not exist, for this user alone.

    Raises:
        BlockingIOError: another server keeps its center there.
        OSError: it cannot be used.

    Attributes:
        directory: as it was given.
        path: the same wherever one stands, as the system calls it.
        descriptor: of the open directory; it stays the same number when the directory is made again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        absolute = Path(os.path.abspath(directory))
        self.path = os.fsencode(absolute)
        exists = os.path.isdir(absolute)  # a disk that hangs would hold who makes what there is already
        if not exists:
            absolute.parent.mkdir(parents=True, exist_ok=True)
        self._guard = _guard_of(absolute)
        try:
            if not exists:
                with suppress(FileExistsError):  # what it is shows when it is opened
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
        """It was removed, and made again: these descriptors of it and its lock take the place of the old ones, under
        their numbers."""
        try:
            os.dup2(directory, self.descriptor, inheritable=False)
            os.dup2(lock, self._lock, inheritable=False)
        finally:
            os.close(directory)
            os.close(lock)

    def close(self) -> None:
        """Another server may have it."""
        os.close(self._lock)
        os.close(self.descriptor)
        self._close_guard()

    def _close_guard(self) -> None:
        if self._guard is not None:
            self._guard.close()


def _guard_of(path: Path) -> socket.socket | None:
    """Keeps others out until it is closed; None where there is no such thing. Raises BlockingIOError."""
    if sys.platform != "linux":
        return None
    real = Path(os.path.realpath(path))
    parent = os.stat(real.parent)
    # The name itself can be read by everybody on the machine: it tells nothing of the path.
    name = hashlib.sha256(b"%d %d " % (parent.st_dev, parent.st_ino) + os.fsencode(real.name)).hexdigest()
    guard = socket.socket(socket.AF_UNIX)
    try:
        guard.bind(f"\0modelaverage-checkpoints-{name}")
    except OSError as error:
        guard.close()
        if error.errno == errno.EADDRINUSE:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from None
        return None  # a system that lets nobody have such names; the lock is there
    return guard
