"""The end of a client's TCP connection, for clients that take nothing of a call that is over.

gRPC keeps what such a client has not taken, two copies of a fragment, until it does or is gone. It offers no way to end
the connection; the kernel does.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path
from urllib.parse import unquote

__all__ = ["cut"]

_DESCRIPTORS = Path("/proc/self/fd")
_Place = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def cut(peer: str) -> bool:
    """Ends the connection to ``peer``, as gRPC names it (``ipv4:10.0.0.7:51234``); False: it finds none."""
    family, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdigit() or not _DESCRIPTORS.is_dir():
        return False
    try:
        wanted = ipaddress.ip_address(host.strip("[]")), int(port)
    except ValueError:
        return False
    return any(_cut_if(int(path.name), wanted) for path in list(_DESCRIPTORS.iterdir()))


def _cut_if(descriptor: int, wanted: _Place) -> bool:
    try:
        # One of our own: gRPC may close its descriptor at any time, and the number may become another file's.
        mine = os.dup(descriptor)
    except OSError:
        return False
    try:
        if not stat.S_ISSOCK(os.fstat(mine).st_mode):
            return False
        with socket.socket(fileno=os.dup(mine)) as connection:
            host, port = connection.getpeername()[:2]
            address = ipaddress.ip_address(host.partition("%")[0])
            # gRPC listens for IPv4 on an IPv6 socket, too.
            if ((address.version == 6 and address.ipv4_mapped) or address, port) != wanted:
                return False
            connection.shutdown(socket.SHUT_RDWR)
            return True
    except (OSError, ValueError):  # it is not connected, or not to an address
        return False
    finally:
        os.close(mine)
