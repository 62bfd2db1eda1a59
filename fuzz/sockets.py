"""TCP connections in memory, as far as the server uses them: the fuzzer, not the kernel, decides what comes when.

They do what Linux does with a socket that does not block: what has come can be read although the peer is gone, the
first bytes that are sent to a peer that has closed vanish, and with SO_RCVLOWAT a socket is readable once there is
enough. VirtualLoop watches them.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections import deque
from typing import Any

__all__ = ["Listener", "MemorySocket", "PLENTY_BYTES"]

# More than any model of the fuzzer has.
PLENTY_BYTES = 1 << 20
_BACKLOG = 1024
_numbers = itertools.count(1 << 20)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class MemorySocket:
    """One end of a connection.

    Attributes:
        peer: the other end.
        inbox: what has come and has not been read.
        room_bytes: how much the inbox takes before the sender has to wait.
        taken_bytes: how much has been read.
        is_closed: whether this end is closed.
        is_ended: whether nothing more will come: the peer has closed its end, or its direction.
        is_reset: whether the connection is broken off.
    """

    family = socket.AF_UNIX
    """A connection of which the kernel does not say how fast it is."""

    def __init__(self) -> None:
        self.peer = self
        self.inbox = bytearray()
        self.room_bytes = PLENTY_BYTES
        self.taken_bytes = 0
        self.is_closed = self.is_ended = self.is_reset = False
        self._low_water_bytes = 1
        self._number = next(_numbers)

    @classmethod
    def pair(cls) -> tuple[MemorySocket, MemorySocket]:
        """Two ends of one connection."""
        one, other = cls(), cls()
        one.peer, other.peer = other, one
        return one, other

    # Used by the loop.

    @property
    def readable(self) -> bool:
        """Whether a reader is woken up."""
        return len(self.inbox) >= self._low_water_bytes or self.is_ended or self.is_reset

    @property
    def writable(self) -> bool:
        """Whether a writer is woken up."""
        return len(self.peer.inbox) < self.peer.room_bytes or self.is_reset or self.peer.is_closed

    # The interface of a socket.

    def recv(self, size_bytes: int) -> bytes:
        """As a socket's."""
        self._check_open()
        if not self.inbox and size_bytes:
            if self.is_reset:
                raise _error(errno.ECONNRESET)
            if not self.is_ended:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data = bytes(self.inbox[:size_bytes])
        del self.inbox[:size_bytes]
        self.taken_bytes += len(data)
        return data

    def recv_into(self, room: memoryview) -> int:
        """As a socket's."""
        data = self.recv(len(room))
        room[: len(data)] = data
        return len(data)

    def send(self, data: bytes | memoryview) -> int:
        """As a socket's."""
        self._check_open()
        if self.is_reset:
            raise _error(errno.EPIPE)
        if self.peer.is_closed:
            self.is_reset = True
            return len(data)
        count = min(len(data), self.peer.room_bytes - len(self.peer.inbox))
        if count <= 0 < len(data):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.peer.inbox += data[:count]
        return count

    def half_close(self) -> None:
        """Sends nothing more."""
        self._check_open()
        self.peer.is_ended = True

    def reset(self) -> None:
        """Breaks the connection off and closes it."""
        self.is_closed = self.peer.is_reset = True

    def close(self) -> None:
        """As a socket's: with unread bytes it becomes a reset."""
        if self.inbox and not self.is_closed:
            self.reset()
        self.is_closed = self.peer.is_ended = True

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        """As a socket's."""
        self._check_open()
        if (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            self._low_water_bytes = max(1, value)

    def getsockopt(self, _level: int, _option: int, size_bytes: int = 0) -> int | bytes:
        """Zeros."""
        self._check_open()
        return bytes(size_bytes) if size_bytes else 0

    def getsockname(self) -> tuple[str, int]:
        """Always the same."""
        self._check_open()
        return "127.0.0.1", 1

    def getpeername(self) -> tuple[str, int]:
        """Always the same."""
        return self.getsockname()

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""
        self._check_open()

    def fileno(self) -> int:
        """A number that no file has; -1 once it is closed."""
        return -1 if self.is_closed else self._number

    def _check_open(self) -> None:
        if self.is_closed:
            raise _error(errno.EBADF)


class Listener:
    """Where clients connect.

    Attributes:
        accepted: the server's ends of connections that it accepted and has not closed.
        refuses: the error number with which `accept` fails; 0: it succeeds.
    """

    def __init__(self) -> None:
        self.accepted: list[MemorySocket] = []
        self.refuses = 0
        self.is_closed = False
        self._backlog: deque[MemorySocket] = deque()

    def connect(self) -> MemorySocket:
        """A client's end of a new connection; it is reset if too many wait to be accepted."""
        client, server = MemorySocket.pair()
        if self.is_closed or len(self._backlog) >= _BACKLOG:
            server.reset()
        else:
            self._backlog.append(server)
        return client

    @property
    def readable(self) -> bool:
        """Whether a connection waits to be accepted."""
        return bool(self._backlog)

    def accept(self) -> tuple[MemorySocket, tuple[str, int]]:
        """As a socket's."""
        if self.is_closed:
            raise _error(errno.EBADF)
        if not self._backlog:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self.refuses:
            raise _error(self.refuses)
        self.accepted = [each for each in self.accepted if not each.is_closed]
        self.accepted.append(self._backlog.popleft())
        return self.accepted[-1], ("127.0.0.1", 2)

    def getsockname(self) -> tuple[str, int]:
        """Where clients connect, if these were sockets."""
        return "127.0.0.1", 40_000

    def close(self) -> None:
        """Accepts no connection any more."""
        self.is_closed = True
        for waiting in self._backlog:
            waiting.reset()
        self._backlog.clear()
