"""The bytes of a TLS connection that two threads use at once: one sends, one receives."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress

__all__ = ["ByteStream", "EncryptedSocket", "RECORD_BYTES"]

RECORD_BYTES = 16 << 10
"""The most plain bytes in one TLS record."""

# Received at once, so that a thread that sends waits no longer than for this.
_PIECE_BYTES = 256 << 10
# AES-GCM may encrypt 2^24.5 full records with one key (RFC 8446, 5.5), and Python cannot change the key.
_MOST_BYTES = 1 << 38


class EncryptedSocket:
    """Sends and receives without waiting, like a plain socket that does not block.

    OpenSSL forbids two operations on one connection at the same time, so each holds a lock. Waits are the caller's.

    Args:
        connection: connected, its handshake done; this object makes it non-blocking.

    Attributes:
        moved_bytes: how many plain bytes were sent, and how many received.
    """

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self.moved_bytes = [0, 0]
        connection.setblocking(False)

    # When an SSLSocket has lost its TLS, `read` and `write` fail; `recv_into` and `send` would go on in plain text.

    def recv_into(self, room: memoryview) -> int:
        """Fills the room with what has arrived; at most 256 KiB at once. Unless the room is full, nothing that has
        arrived is left inside TLS.

        Returns:
            How many bytes; 0: the peer has closed the connection.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: the connection is lost.
        """
        count = 0
        with self._lock:
            while count < len(room) and count < _PIECE_BYTES:
                try:
                    one = int(self._socket.read(len(room) - count, room[count:]))
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    if count == 0:
                        raise BlockingIOError from None
                    break
                if one == 0:
                    break
                count += one
            self.moved_bytes[1] += count
        return count

    def send(self, data: memoryview | bytes) -> int:
        """Sends all of the data.

        Raises:
            BlockingIOError: there is no room; nothing but the same data may be sent next.
            OSError: the connection is lost.
        """
        with self._lock:
            try:
                sent = self._socket.write(data)
            except ssl.SSLWantWriteError:
                raise BlockingIOError from None
            self.moved_bytes[0] += sent
        return sent

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether bytes that have arrived are left inside TLS, where polling the socket does not show them."""
        with self._lock:
            return self._socket.pending() > 0

    @property
    def is_spent(self) -> bool:
        """Whether its keys have encrypted as much as they may: a new connection has new ones."""
        return max(self.moved_bytes) >= _MOST_BYTES

    def end(self) -> None:
        """Ends a send or receive in progress, from any thread. `SSLSocket.shutdown` would end the TLS alone first."""
        with suppress(OSError):  # the other end has already closed
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


ByteStream = socket.socket | EncryptedSocket
"""Both have ``recv_into`` and ``send``, and raise BlockingIOError."""
