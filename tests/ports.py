"""Ports for servers that die and come back: no other process gets them meanwhile."""

from __future__ import annotations

import random
import socket
from pathlib import Path

__all__ = ["lasting_port"]

_FIRST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def lasting_port() -> int:
    """A port of loopback on which nothing listens, and which the kernel hands to no process that asks for any port.

    Otherwise a test that runs at the same time could get it while the server is away.
    """
    end = int(_RANGE.read_text(encoding="ascii").split()[0]) if _RANGE.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(_FIRST, end)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
