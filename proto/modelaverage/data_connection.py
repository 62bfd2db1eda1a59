"""What both ends of a data connection know: its greeting, and how its socket is set up. The .proto says what it is for.

A call costs gRPC about one processor second for 300 MB; the bytes alone, on a socket, cost a third of that
(docs/decisions/0017).
"""

from __future__ import annotations

import secrets
import socket
import struct
import sys

__all__ = [
    "HALF_KEY_BYTES",
    "NOTICES_IN_SILENCE",
    "NUMBER",
    "SILENCE_TIMEOUT_S",
    "halves",
    "new_key",
    "prepare",
    "use_short_queues",
    "want",
]

HALF_KEY_BYTES = 16
NUMBER = struct.Struct("<Q")
"""The number of a push, which comes before its bytes."""

SILENCE_TIMEOUT_S = 20.0
"""A connection on which nothing moves for longer, though something should, is lost.

A link of 0.5 Mbit/s takes 17 s for a queue of 1 MiB before it: nothing that is sent through that is answered earlier.
"""
NOTICES_IN_SILENCE = 4
"""After this part of that time it is said, and again after 3 such parts."""

# Between two pushes the way stays open, and a peer that is gone is noticed: probes from 5 s on, until the limit above.
_OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
)
# Both measured with `python -m bench.links` at 1 Gbit.
_WAKE_UP_BYTES = 256 << 10
_SHORT_QUEUE_BYTES = 64 << 10  # the kernel takes it twice, for its own accounts
_SHORT_WAY_US = 1000
# linux/tcp.h: struct tcp_info has the least round trip so far, in microseconds, at this place.
_MIN_RTT_AT = 148


def new_key() -> bytes:
    """A key for one connection."""
    return secrets.token_bytes(2 * HALF_KEY_BYTES)


def halves(key: bytes) -> tuple[bytes, bytes]:
    """What the client says first, and what the server answers. Raises ValueError: it is no key."""
    if len(key) != 2 * HALF_KEY_BYTES:
        raise ValueError(f"a key has {2 * HALF_KEY_BYTES} bytes, not {len(key)}")
    return key[:HALF_KEY_BYTES], key[HALF_KEY_BYTES:]


def prepare(connection: socket.socket, silence_timeout_s: float) -> None:
    """Sets options that hold for as long as the connection is there.

    Bytes that get no acknowledgement for ``silence_timeout_s`` end it. On Linux (6.18, measured) so do those that the
    peer has no room for, although its kernel answers every probe. So a push that is held until a round with a quorum
    is over, and is not read before, loses its connection and waits on in messages.
    """
    options = (*_OPTIONS, (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", round(silence_timeout_s * 1000)))
    for level, name, value in options:
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(level, getattr(socket, name), value)


def want(connection: socket.socket, size_bytes: int) -> None:
    """So many bytes are awaited: whoever waits for them is not woken up for every packet."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(size_bytes, _WAKE_UP_BYTES))


def use_short_queues(connection: socket.socket) -> None:
    """On a short way (a round trip below 1 ms) keeps no more on its way than it needs.

    TCP sends faster and faster until a switch's queue is full and packets are lost, and where several workers send to
    one server at once, that is all the time. 128 KiB fill a link of 1 Gbit/s at 1 ms, of 10 at 0.1. On longer ways more
    has to be on its way, and it is left to the kernel how much.
    """
    if not sys.platform.startswith("linux") or connection.getsockname()[0] == connection.getpeername()[0]:
        return
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) >= _MIN_RTT_AT + 4 and struct.unpack_from("=I", info, _MIN_RTT_AT)[0] < _SHORT_WAY_US:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SHORT_QUEUE_BYTES)
