"""Ends the TCP connections of clients that read nothing of a call that is over.

gRPC keeps what such a client has not read, two copies of a fragment, until the client reads it or vanishes. gRPC cannot
end the connection; the kernel can.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import stat
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from modelaverage.addresses import parse

__all__ = ["Taking", "cut", "taking"]

_DESCRIPTORS = Path("/proc/self/fd")
_Place = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]
_T = TypeVar("_T")
# The offset of the number of acknowledged bytes in struct tcp_info (linux/tcp.h).
_TCP_INFO_BYTES, _BYTES_ACKED_AT = 256, 120


@dataclass(frozen=True)
class Taking:
    """How far a client has read its connection.

    Args:
        acknowledged_bytes: since the connection began.
        waiting_bytes: bytes that the kernel has not sent, or that are not acknowledged yet.
    """

    acknowledged_bytes: int
    waiting_bytes: int

    def goes_on_since(self, before: Taking | None) -> bool:
        """Whether bytes are moving: then the link may be slow, but the client is reading."""
        return self.waiting_bytes > 0 and (before is None or self.acknowledged_bytes > before.acknowledged_bytes)


def cut(peer: str) -> bool:
    """Ends the connection to ``peer``, as gRPC names it (``ipv4:10.0.0.7:51234``); False: there is none."""
    return _with_connection(peer, _cut) is not None


def taking(peer: str) -> Taking | None:
    """How far ``peer`` has read; None: there is no connection, or the kernel does not say."""
    return _with_connection(peer, _taking)


def _cut(connection: socket.socket) -> bool:
    connection.shutdown(socket.SHUT_RDWR)
    return True


def _taking(connection: socket.socket) -> Taking | None:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _BYTES_ACKED_AT + 8:
        return None
    (acknowledged,) = struct.unpack_from("=Q", info, _BYTES_ACKED_AT)
    (waiting,) = struct.unpack("=i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return Taking(acknowledged, waiting)


def _with_connection(peer: str, use: Callable[[socket.socket], _T | None]) -> _T | None:
    family, _, address = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6") or not _DESCRIPTORS.is_dir():
        return None
    try:
        where = parse(address)
        wanted = ipaddress.ip_address(where.host), where.port
    except ValueError:
        return None
    for path in list(_DESCRIPTORS.iterdir()):
        found = _if_it_is(int(path.name), wanted, use)
        if found is not None:
            return found
    return None


def _if_it_is(descriptor: int, wanted: _Place, use: Callable[[socket.socket], _T | None]) -> _T | None:
    try:
        # A duplicate, because gRPC may close its descriptor at any time, and the number may then be another file's.
        mine = os.dup(descriptor)
    except OSError:
        return None
    try:
        if not stat.S_ISSOCK(os.fstat(mine).st_mode):
            return None
        with socket.socket(fileno=os.dup(mine)) as connection:
            host, port = connection.getpeername()[:2]
            address = ipaddress.ip_address(host.partition("%")[0])
            # gRPC accepts IPv4 on its IPv6 sockets.
            if ((address.version == 6 and address.ipv4_mapped) or address, port) != wanted:
                return None
            return use(connection)
    except (OSError, ValueError):  # it is not connected, or is not an IP socket
        return None
    finally:
        os.close(mine)
