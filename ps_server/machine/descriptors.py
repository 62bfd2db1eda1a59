"""Descriptors: as many as the system allows, compared with what the workers need; and a word when there are none.

gRPC accepts connections itself. Without a descriptor it lets them wait, tries again every second, and says nothing.
Clients give up and try again, and the queue fills with connections that are dead: with descriptors at hand again, gRPC
would take these first, as many a second as it has descriptors, and be deaf to everybody else for minutes.
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

# More than the most workers need; where the hard limit is a billion, strangers shall not have as much.
_MOST = 1 << 16
# A worker has one connection for its calls, and one for its bytes or a segment of shared memory, which is two: the
# segment and its mapping.
_OF_CONNECTION, _OF_DATA_CONNECTION, _OF_SEGMENT = 1, 1, 2
# Two buffers and two old ones, each as a segment.
_OF_CENTER = 4 * _OF_SEGMENT
# Who asks for the status or the metrics, connections of processes that were killed, files.
_SPARE = 16

_LOOK_INTERVAL_S = 1.0
_LOOK_INTERVAL_WITHOUT_S = 0.25
# Connections that wait to be let in: gRPC lets in so few within a second; of more, so many are turned away in one look.
_FEW_WAITING, _MOST_TURNED_AWAY = 8, 5000
# An episode is over when there have been descriptors for so long.
_SETTLED_S = 5.0
# Without descriptors, a connection that has said nothing for so long is cut off.
_SILENCE_S = 2.0
# Of Linux's struct tcp_info.
_TCP_ESTABLISHED, _TCP_CLOSE_WAIT, _TCP_LISTEN = 1, 8, 10
_WAITING_AT, _BYTES_RECEIVED_AT, _TCP_INFO_BYTES = 24, 128, 136


def raise_limit() -> None:
    """The soft limit on descriptors becomes the hard one, 65,536 at most; it is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS knows a lower limit than it says
            return


def check_limit(max_workers: int, has_shared_memory: bool, has_data_port: bool, open_now: int | None = None) -> int:
    """How many descriptors a server needs that has opened all that it needs without workers; warns if the limit is
    lower.

    Args:
        max_workers: how many may stand in a round.
        has_shared_memory: whether it lends memory.
        has_data_port: whether it takes data connections.
        open_now: how many are open; None: it is counted, where that is possible.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = _OF_CONNECTION + max(_OF_SEGMENT * has_shared_memory, _OF_DATA_CONNECTION * has_data_port)
    own = (_count() if open_now is None else open_now) + _OF_CENTER * has_shared_memory + _SPARE
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
    """Looks every second whether the process can have another descriptor; says when it cannot, and when it can again.

    While there are none, connections on which nothing has come yet are cut off, for they are nobody's. Once there are
    some, those that have piled up meanwhile are turned away: most are dead, and the others' clients try again within a
    second.

    Args:
        reserve: for the look itself.
    """

    def __init__(self, reserve: Reserve) -> None:
        self._reserve = reserve
        self._none_since_s: float | None = None
        self._some_since_s: float | None = None
        self._turned_away = 0
        self._silent: dict[tuple[int, object], float] = {}  # by descriptor and peer: since when

    async def run(self) -> None:
        """Never returns."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S if self._none_since_s is None else _LOOK_INTERVAL_WITHOUT_S)
            self.look(clock())

    def look(self, now_s: float) -> None:
        """One look, at this time."""
        if not _has_some():
            self._some_since_s = None
            if self._none_since_s is None:
                self._none_since_s, self._turned_away = now_s, 0
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                _log.warning(
                    "all %d descriptors are in use: nobody else can connect until some are free. Raise `ulimit -n`, or "
                    "find out who is connected (ss -tnp)",
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
                "there are descriptors again, after %.0f s; %d connections were turned away",
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
                        arrived, _ = listener.accept()  # OSError: no more wait, or there are no descriptors again
                        arrived.close()
                        self._turned_away += 1

    def _descriptors(self) -> list[int]:
        try:
            return self._reserve.open(lambda: [int(name) for name in os.listdir("/proc/self/fd")])
        except OSError:  # there are none for that, or it is no Linux
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
    """The socket behind a descriptor that is gRPC's: one of our own is not to be had. None: there is no stream socket.
    Of the body's OSErrors nobody hears: gRPC may close it at any time."""
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
    """How many connections wait to be let in; 0 for what does not listen for TCP."""
    info = _tcp_info(listener)
    return int(struct.unpack_from("=I", info, _WAITING_AT)[0]) if info and info[0] == _TCP_LISTEN else 0


def _peer_if_silent(connection: socket.socket) -> object | None:
    """Who is connected over TCP but has not sent a byte."""
    info = _tcp_info(connection)
    if not info or info[0] not in (_TCP_ESTABLISHED, _TCP_CLOSE_WAIT):
        return None
    (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
    return None if received else connection.getpeername()


def _tcp_info(connection: socket.socket) -> bytes:
    """Linux's struct tcp_info; empty if there is none."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return b""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return info if len(info) == _TCP_INFO_BYTES else b""
