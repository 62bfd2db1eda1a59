"""What both ends of a data connection know: its greeting, and how its socket is set up. The .proto says what it is for.

A call costs gRPC about one processor second for 300 MB; the bytes alone, on a socket, cost a third of that
(docs/decisions/0017).
"""

from __future__ import annotations

import secrets
import socket
import struct
import sys
from typing import NamedTuple

__all__ = [
    "HALF_KEY_BYTES",
    "NOTICES_IN_SILENCE",
    "NUMBER",
    "Pace",
    "halves",
    "new_key",
    "prepare",
    "use_short_queues",
    "want",
]

HALF_KEY_BYTES = 16
NUMBER = struct.Struct("<Q")
"""The number of a push, which comes before its bytes."""

NOTICES_IN_SILENCE = 4
"""After this part of the longest silence it is said, and again after 3 such parts. On a slow link 8 s may pass."""

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
# linux/tcp.h: struct tcp_info has these at these places. In microseconds, bytes a second.
_BYTES_ACKED_AT = 120
_MIN_RTT_AT = 148
_DELIVERY_RATE_AT = 160
_TCP_INFO_BYTES = 256
# No more is on its way than the link takes in this time, but so much always.
_QUEUE_S = 1.0
_LEAST_QUEUE_BYTES = 64 << 10
_LEAST_PIECE_BYTES = 16 << 10
_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S = 0.25, 0.002
# At once, so that a sender that waits for the kernel to take them is not silent for long. At 0.5 Mbit/s that takes 4 s.
_MOST_PIECE_BYTES = 256 << 10


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
    measured = _measured(connection)
    if measured is not None and measured.min_rtt_us < _SHORT_WAY_US:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SHORT_QUEUE_BYTES)


class Pace:
    """How much may be handed to the kernel: no more than the link takes in a second is to be on its way.

    The kernel would take some MB, and the queue before a slow link as much again: at 0.5 Mbit/s all else that uses this
    link, the calls beside this connection and their pings first of all, would wait a minute behind that. What the link
    takes, the kernel knows (TCP_INFO). On a fast one this never says no.

    Args:
        connection: the socket on which bytes go.

    Attributes:
        pause_s: how long to wait when there is no room.
        waiting_bytes: what the peer had not acknowledged when `room` looked last.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
        self._knows = is_tcp and sys.platform.startswith("linux")
        self._noted_bytes = self._measured_from_bytes = 0
        self.waiting_bytes = 0
        self.pause_s = _SHORTEST_PAUSE_S

    def begin(self) -> None:
        """A push begins: what the link takes now is yet to be measured."""
        measured = self._look()
        if measured is not None:
            self._measured_from_bytes = measured.acknowledged_bytes + _LEAST_QUEUE_BYTES // 2

    def room(self) -> int:
        """How many bytes may go now; 0: none, look again after `pause_s`. Raises OSError: the connection is closed."""
        measured = self._look()
        if measured is None:
            return _MOST_PIECE_BYTES
        bytes_per_s = measured.bytes_per_s
        if measured.acknowledged_bytes < self._measured_from_bytes:
            bytes_per_s = 0
        most_bytes = max(_LEAST_QUEUE_BYTES, round(bytes_per_s * (_QUEUE_S + measured.min_rtt_us / 1e6)))
        self.waiting_bytes = _unacknowledged_bytes(self._socket)
        room_bytes = most_bytes - self.waiting_bytes
        if room_bytes >= _LEAST_PIECE_BYTES:
            return min(room_bytes, _MOST_PIECE_BYTES)
        wait_s = _LEAST_PIECE_BYTES / max(1, measured.bytes_per_s)
        self.pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, wait_s))
        return 0

    def moves(self) -> bool:
        """Whether the peer has acknowledged bytes since this was asked last; False where nobody knows."""
        try:
            measured = self._look()
        except OSError:  # it is closed
            return False
        if measured is None:
            return False
        before_bytes, self._noted_bytes = self._noted_bytes, measured.acknowledged_bytes
        return self._noted_bytes > before_bytes

    def _look(self) -> _Measured | None:
        measured = _measured(self._socket) if self._knows else None
        self._knows = measured is not None
        return measured


class _Measured(NamedTuple):
    """What the kernel knows of a way: the least round trip so far, how many bytes the peer has acknowledged, and how
    many it takes a second; 0 before that is known."""

    min_rtt_us: int
    acknowledged_bytes: int
    bytes_per_s: int


def _measured(connection: socket.socket) -> _Measured | None:
    """None: the kernel does not say."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _DELIVERY_RATE_AT + 8:
        return None
    return _Measured(
        struct.unpack_from("=I", info, _MIN_RTT_AT)[0],
        struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0],
        struct.unpack_from("=Q", info, _DELIVERY_RATE_AT)[0],
    )


def _unacknowledged_bytes(connection: socket.socket) -> int:
    """How many bytes the kernel has taken and the peer has not acknowledged."""
    import fcntl  # not above: not every system has them
    import termios

    answer = fcntl.ioctl(connection, termios.TIOCOUTQ, struct.pack("=i", 0))
    return int(struct.unpack("=i", answer)[0])
