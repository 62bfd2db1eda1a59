"""Descriptors: raises the limit, compares it with what the workers need, and says so when none are left.

gRPC accepts connections itself. Without a free descriptor it lets them wait, tries again every second, and logs
nothing. Clients give up and try again, and the queue fills with dead connections. Once descriptors are free again, gRPC
would accept the dead ones first, as many a second as it has descriptors, and answer no other client for minutes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelaverage.logs import event
from ps_server.machine.reserve import Reserve

__all__ = ["DescriptorWatch", "check_limit", "raise_limit"]

_log = logging.getLogger("ps_server")

# More than the largest number of workers needs. Where the hard limit is a billion, strangers must not be able to use
# it.
_MOST = 1 << 16
# A worker has a connection for its calls, and another for its bytes or a segment of shared memory. A segment takes two
# descriptors: the segment and its mapping.
_OF_CONNECTION, _OF_DATA_CONNECTION, _OF_SEGMENT = 1, 1, 2
# Two buffers and two old buffers, each a segment.
_OF_CENTER = 4 * _OF_SEGMENT
# For clients that ask for status or metrics, connections of killed processes, and files.
_SPARE = 16

_LOOK_INTERVAL_S = 1.0
_LOOK_INTERVAL_WITHOUT_S = 0.25
# Connections that wait to be accepted: gRPC accepts this few within a second; of more, at most this many are turned
# away in one look.
_FEW_WAITING, _MOST_TURNED_AWAY = 8, 5000
# A shortage is over when descriptors have been free for this long.
_SETTLED_S = 5.0
# During a shortage, a connection on which nothing has arrived for this long is closed.
_SILENCE_S = 2.0
# From Linux's struct tcp_info.
_TCP_ESTABLISHED, _TCP_CLOSE_WAIT, _TCP_LISTEN = 1, 8, 10
_WAITING_AT, _BYTES_RECEIVED_AT, _TCP_INFO_BYTES = 24, 128, 136


def raise_limit() -> None:
    """Raises the soft limit on descriptors to the hard one, but not above 65,536; never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS has a lower limit than it reports
            return


def check_limit(
    max_workers: int, has_shared_memory: bool, has_data_port: bool, others: int = 0, open_now: int | None = None
) -> int:
    """How many descriptors a server needs with all its workers; warns if the limit is lower. Called when the server has
    opened everything that it needs without workers.

    Args:
        max_workers: how many workers a round admits.
        has_shared_memory: whether the server lends memory.
        has_data_port: whether it accepts data connections.
        others: the most descriptors that its page needs.
        open_now: how many are open; None: they are counted, where that is possible.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = _OF_CONNECTION + max(_OF_SEGMENT * has_shared_memory, _OF_DATA_CONNECTION * has_data_port)
    own = (_count() if open_now is None else open_now) + _OF_CENTER * has_shared_memory + _SPARE + others
    needed = own + each * max_workers
    if limit != resource.RLIM_INFINITY and limit < needed:
        _log.warning(
            "%d workers may need %d descriptors (%d each, %d for the server itself), and the limit is %d: when they "
            "are used up, nobody else can connect, not even for the status. Start the server with `ulimit -n %d` "
            "or more%s",
            max_workers,
            needed,
            each,
            own,
            limit,
            needed,
            "" if hard == resource.RLIM_INFINITY or needed <= hard else f" (the hard limit, {hard}, has to be raised)",
            extra=event("few_descriptors", limit=limit, needed=needed),
        )
    return needed


class DescriptorWatch:
    """Checks every second whether the process can open another descriptor, and logs the beginning and end of a
    shortage.

    During a shortage, connections on which nothing has arrived yet are closed. Afterwards, connections that have queued
    up are turned away: most are dead, and the clients of the others try again within a second.

    Args:
        reserve: lends the descriptor for the check itself.
    """

    def __init__(self, reserve: Reserve) -> None:
        self._reserve = reserve
        self._none_since_s: float | None = None
        self._some_since_s: float | None = None
        self._turned_away = 0
        self._silent: dict[tuple[int, object], float] = {}  # since when, by descriptor and peer

    async def run(self) -> None:
        """Never returns."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S if self._none_since_s is None else _LOOK_INTERVAL_WITHOUT_S)
            self.look(clock())

    def look(self, now_s: float) -> None:
        """Checks once, at this time."""
        if not _has_some():
            self._some_since_s = None
            if self._none_since_s is None:
                self._none_since_s, self._turned_away = now_s, 0
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                _log.warning(
                    "all %d descriptors are in use: nobody else can connect until some are free. Raise `ulimit -n`, or "
                    "find out which processes are connected (ss -tnp)",
                    limit,
                    extra=event("no_descriptors", limit=limit),
                )
            self._cut_silent(now_s)
            return
        if self._none_since_s is None:
            return
        self._reserve.refill()
        self._silent.clear()
        self._turn_away()
        self._some_since_s = now_s if self._some_since_s is None else self._some_since_s
        if now_s - self._some_since_s >= _SETTLED_S:
            lasted_s = self._some_since_s - self._none_since_s
            self._none_since_s = None
            _log.warning(
                "descriptors are free again, after %.0f s; %d connections were turned away",
                lasted_s,
                self._turned_away,
                extra=event("descriptors_again", waited_s=lasted_s, turned_away=self._turned_away),
            )

    def _cut_silent(self, now_s: float) -> None:
        silent: dict[tuple[int, object], float] = {}
        for descriptor in self._descriptors():
            with _borrowed(descriptor) as connection:
                peer = None if connection is None else _peer_if_silent(connection)
                if connection is None or peer is None:
                    continue
                since_s = self._silent.get((descriptor, peer), now_s)
                if now_s - since_s < _SILENCE_S:
                    silent[descriptor, peer] = since_s
                else:
                    connection.shutdown(socket.SHUT_RDWR)
        self._silent = silent

    def _turn_away(self) -> None:
        for descriptor in self._descriptors():
            with _borrowed(descriptor) as listener:
                if listener is not None and _waiting(listener) > _FEW_WAITING and not os.get_blocking(descriptor):
                    for _ in range(_MOST_TURNED_AWAY):
                        arrived, _ = listener.accept()  # OSError: the queue is empty, or descriptors have run out again
                        arrived.close()
                        self._turned_away += 1

    def _descriptors(self) -> list[int]:
        try:
            return self._reserve.open(lambda: [int(name) for name in os.listdir("/proc/self/fd")])
        except OSError:  # no descriptor is free for that, or this is not Linux
            return []


def _count() -> int:
    try:
        return len(list(Path("/proc/self/fd").iterdir()))
    except OSError:
        return _SPARE


def _has_some() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket | None]:
    """The socket behind one of gRPC's descriptors, used directly because no descriptor is free for a duplicate. None:
    it is not a stream socket. OSErrors of the body are suppressed, because gRPC may close the socket at any time."""
    borrowed: socket.socket | None = None
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            borrowed = socket.socket(fileno=descriptor)
    is_stream = borrowed is not None and borrowed.type == socket.SOCK_STREAM
    try:
        with suppress(OSError):
            yield borrowed if is_stream else None
    finally:
        if borrowed is not None:
            borrowed.detach()


def _waiting(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0 for a socket that does not listen for TCP."""
    info = _tcp_info(listener)
    return int(struct.unpack_from("=I", info, _WAITING_AT)[0]) if info and info[0] == _TCP_LISTEN else 0


def _peer_if_silent(connection: socket.socket) -> object | None:
    """The peer of a TCP connection on which no byte has arrived; None otherwise."""
    info = _tcp_info(connection)
    if not info or info[0] not in (_TCP_ESTABLISHED, _TCP_CLOSE_WAIT):
        return None
    (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
    return None if received else connection.getpeername()


def _tcp_info(connection: socket.socket) -> bytes:
    """Linux's struct tcp_info; empty if the socket has none."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return b""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return info if len(info) == _TCP_INFO_BYTES else b""
