"""What both ends of a data connection share: its greeting and the settings of its socket. The .proto explains its use.

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
    "OVER_TLS",
    "Pace",
    "halves",
    "new_key",
    "prepare",
    "use_short_queues",
    "want",
]

HALF_KEY_BYTES = 16
NUMBER = struct.Struct("<Q")
"""The encoding of a push's number, which precedes its bytes."""

OVER_TLS = "data_connection_tls"
"""The name of the transport when both ends encrypt, in `accepts_transports`, `offers` and `uses_transport`. Its details
are a `DataConnection` message."""

NOTICES_IN_SILENCE = 4
"""A silence is logged after this fraction of the longest one allowed, and again after 3 times as much. On a slow link,
8 s of silence are normal."""

# Keeps the connection usable between two pushes and notices a dead peer: probes after 5 s, up to the limit above.
_OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
)
# Measured with `python -m bench.versions` on loopback, and with `python -m bench.links` at 1 Gbit.
_WAKE_UP_BYTES = 1 << 20
# Measured with `python -m bench.links` at 1 Gbit.
_SHORT_QUEUE_BYTES = 64 << 10  # the kernel doubles it for its own bookkeeping
_SHORT_WAY_US = 1000
# Offsets in struct tcp_info (linux/tcp.h). Units are microseconds, bytes, and bytes per second.
_BYTES_ACKED_AT = 120
_MIN_RTT_AT = 148
_DELIVERY_RATE_AT = 160
_TCP_INFO_BYTES = 256
# At most what the link takes in this time is in flight, but always this many bytes.
_QUEUE_S = 1.0
_LEAST_QUEUE_BYTES = 64 << 10
_LEAST_PIECE_BYTES = 16 << 10
_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S = 0.25, 0.002
# The most bytes handed over at once: more on a fast link, where each piece costs a look at the link; few enough that a
# waiting sender is not silent for long. 256 KiB take 4 s at 0.5 Mbit/s.
_MOST_PIECE_BYTES, _MOST_PIECE_S, _LARGEST_PIECE_BYTES = 256 << 10, 0.02, 4 << 20


def new_key() -> bytes:
    """A key for one connection."""
    return secrets.token_bytes(2 * HALF_KEY_BYTES)


def halves(key: bytes) -> tuple[bytes, bytes]:
    """The client's greeting and the server's answer. Raises ValueError if ``key`` has another length."""
    if len(key) != 2 * HALF_KEY_BYTES:
        raise ValueError(f"a key has {2 * HALF_KEY_BYTES} bytes, not {len(key)}")
    return key[:HALF_KEY_BYTES], key[HALF_KEY_BYTES:]


def prepare(connection: socket.socket, silence_timeout_s: float) -> None:
    """Sets the options of a new connection.

    The connection ends if bytes are not acknowledged for ``silence_timeout_s``. On Linux (6.18, measured) it also ends
    if the peer has no room for them in that time, although its kernel answers every probe. So a push that a quorum's
    round holds back unread loses its data connection, and continues in messages.
    """
    options = (*_OPTIONS, (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", round(silence_timeout_s * 1000)))
    for level, name, value in options:
        if hasattr(socket, name):  # not every system has every option
            connection.setsockopt(level, getattr(socket, name), value)


def want(connection: socket.socket, size_bytes: int) -> None:
    """Wakes a waiting reader only once this many bytes have arrived, not for every packet."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(size_bytes, _WAKE_UP_BYTES)))


def use_short_queues(connection: socket.socket) -> None:
    """On a short path (a round trip below 1 ms), limits the bytes in flight to what the path needs.

    TCP speeds up until a switch's queue is full and packets are lost; with several workers that send to one server,
    that happens all the time. 128 KiB fill a link of 1 Gbit/s at 1 ms, or of 10 Gbit/s at 0.1 ms. Longer paths need
    more, and the kernel decides how much.
    """
    if not sys.platform.startswith("linux") or connection.getsockname()[0] == connection.getpeername()[0]:
        return
    measured = _measured(connection)
    if measured is not None and measured.min_rtt_us < _SHORT_WAY_US:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SHORT_QUEUE_BYTES)


class Pace:
    """Limits the bytes in flight to what the link takes in a second.

    Otherwise the kernel would take several MB, and the queue before a slow link as much again. At 0.5 Mbit/s,
    everything else on that link would wait a minute behind them, above all this push's call and its pings.
    The kernel measures the link's speed (TCP_INFO). On a fast link the limit never matters.

    Args:
        connection: the socket that sends the bytes.

    Attributes:
        pause_s: how long to wait when there is no room.
        waiting_bytes: what the peer had not acknowledged at the last call of `room`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
        self._knows = is_tcp and sys.platform.startswith("linux")
        self._noted_bytes = self._measured_from_bytes = 0
        self.waiting_bytes = 0
        self.pause_s = _SHORTEST_PAUSE_S

    def begin(self) -> None:
        """Begins a push: the link's speed is measured again."""
        measured = self._look()
        if measured is not None:
            self._measured_from_bytes = measured.acknowledged_bytes + _LEAST_QUEUE_BYTES // 2

    def room(self) -> int:
        """How many bytes may be sent now; 0: call again after `pause_s`. Raises OSError if the connection is closed."""
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
            most_bytes = min(_LARGEST_PIECE_BYTES, max(_MOST_PIECE_BYTES, round(bytes_per_s * _MOST_PIECE_S)))
            return min(room_bytes, most_bytes)
        wait_s = _LEAST_PIECE_BYTES / max(1, measured.bytes_per_s)
        self.pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, wait_s))
        return 0

    def moves(self) -> bool:
        """Whether the peer has acknowledged bytes since the last call; False if the kernel does not say."""
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
    """What the kernel measures on a connection: the shortest round trip so far, the bytes that the peer has
    acknowledged, and the bytes per second that it takes (0: not known yet)."""

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
    import fcntl  # imported here because not every system has them
    import termios

    answer = fcntl.ioctl(connection, termios.TIOCOUTQ, struct.pack("=i", 0))
    return int(struct.unpack("=i", answer)[0])
