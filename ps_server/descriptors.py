"""Descriptors: as many as the system allows, compared with what the workers need; and a word when there are none.

gRPC accepts connections itself. Without a descriptor it lets them wait, tries again every second, and says nothing.
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
import sys
from collections.abc import Callable
from pathlib import Path

from modelaverage.logs import event
from ps_server.reserve import Reserve

__all__ = ["DescriptorWatch", "check_limit", "raise_limit"]

_log = logging.getLogger("ps_server")

# More than the most workers need; where the hard limit is a billion, strangers shall not have as much.
MOST = 1 << 16
# A worker has one connection for its calls, and one for its bytes or a segment of shared memory, which is two: the
# segment and its mapping.
_OF_CONNECTION, _OF_DATA_CONNECTION, _OF_SEGMENT = 1, 1, 2
# Two buffers and two old ones, each as a segment.
_OF_CENTER = 4 * _OF_SEGMENT
# Who asks for the status or the metrics, connections of processes that were killed, files.
_SPARE = 16

_LOOK_INTERVAL_S = 1.0
# An episode is over when there have been descriptors for so long.
_SETTLED_S = 5.0
# Without descriptors, a connection that has said nothing for so long is cut off.
_SILENCE_S = 2.0
# Of Linux's struct tcp_info.
_TCP_ESTABLISHED, _TCP_CLOSE_WAIT = 1, 8
_BYTES_RECEIVED_AT, _TCP_INFO_BYTES = 128, 136


def raise_limit() -> None:
    """The soft limit on descriptors becomes the hard one, 65,536 at most; it is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
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
            "%d workers may need %d descriptors (%d each, %d for the server itself), and the limit is %d: when they are "
            "used up, nobody else can connect, not even to ask for the status. Start the server with `ulimit -n %d` or "
            "more%s",
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

    While there are none, connections on which nothing has come yet are cut off: they are nobody's, and whoever waits to
    be let in can be.

    Args:
        reserve: for the look itself.
    """

    def __init__(self, reserve: Reserve) -> None:
        self._reserve = reserve
        self._none_since_s: float | None = None
        self._some_since_s: float | None = None
        self._silent: dict[tuple[int, object], float] = {}  # by descriptor and peer: since when

    async def run(self) -> None:
        """Never returns."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            self.look(clock())

    def look(self, now_s: float, has_some: Callable[[], bool] | None = None) -> None:
        """One look, at this time."""
        if not (has_some or _has_some)():
            self._some_since_s = None
            if self._none_since_s is None:
                self._none_since_s = now_s
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
        self._silent.clear()
        self._some_since_s = now_s if self._some_since_s is None else self._some_since_s
        if now_s - self._some_since_s >= _SETTLED_S:
            lasted_s = self._some_since_s - self._none_since_s
            self._none_since_s = None
            _log.warning(
                "there are descriptors again, after %.0f s without",
                lasted_s,
                extra=event("descriptors_again", waited_s=lasted_s),
            )

    def _cut_silent(self, now_s: float) -> None:
        if not sys.platform.startswith("linux"):
            return
        try:
            descriptors = self._reserve.open(lambda: [int(name) for name in os.listdir("/proc/self/fd")])
        except OSError:
            return
        silent: dict[tuple[int, object], float] = {}
        for descriptor in descriptors:
            peer = _peer_if_silent(descriptor)
            if peer is None:
                continue
            since_s = self._silent.get((descriptor, peer), now_s)
            if now_s - since_s >= _SILENCE_S:
                _shut(descriptor)
            else:
                silent[descriptor, peer] = since_s
        self._silent = silent


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


def _peer_if_silent(descriptor: int) -> object | None:
    """Who is connected over TCP but has not sent a byte."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        borrowed = socket.socket(fileno=descriptor)  # a descriptor of its own is not to be had
    except OSError:
        return None
    try:
        if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.type != socket.SOCK_STREAM:
            return None
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) < _TCP_INFO_BYTES or info[0] not in (_TCP_ESTABLISHED, _TCP_CLOSE_WAIT):
            return None
        (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
        return None if received else borrowed.getpeername()
    except OSError:
        return None
    finally:
        borrowed.detach()


def _shut(descriptor: int) -> None:
    try:
        borrowed = socket.socket(fileno=descriptor)
    except OSError:
        return
    try:
        borrowed.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        borrowed.detach()
