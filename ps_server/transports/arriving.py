"""A connection beside the calls, from its arrival to its first bytes: waits, TLS, and the log of refused strangers."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from modelaverage.logs import event
from modelaverage.runtime.encrypted_socket import ByteStream

__all__ = ["Strangers", "handshake", "read_all", "write_all"]

_log = logging.getLogger("ps_server")
# Otherwise strangers could fill the log.
_LOG_EVERY_S = 1.0
_UNREAD_BYTES = 64 << 10


async def read_all(stream: ByteStream, size_bytes: int) -> bytes:
    """This many bytes; fewer if the stream ends. Raises OSError."""
    room = memoryview(bytearray(size_bytes))
    received = 0
    while received < size_bytes:
        try:
            count = stream.recv_into(room[received:])
        except BlockingIOError:
            await _readable(stream)
            continue
        if count == 0:
            break
        received += count
    return bytes(room[:received])


async def write_all(stream: ByteStream, data: memoryview | bytes) -> None:
    """Sends all bytes; returns once the kernel has them. Raises OSError."""
    while data:
        try:
            sent = stream.send(data)
        except BlockingIOError:
            await _writable(stream)
            continue
        data = data[sent:]


async def handshake(connection: ssl.SSLSocket) -> None:
    """Makes the server's side of a TLS handshake. Raises OSError."""
    while True:
        try:
            connection.do_handshake()
            return
        except ssl.SSLWantReadError:
            await _readable(connection)
        except ssl.SSLWantWriteError:
            await _writable(connection)
        except ssl.SSLError:
            # An end with bytes unread would be a reset, which may overtake the alert that says why.
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_WR)
                socket.socket.recv(connection, _UNREAD_BYTES)
            raise


async def _readable(stream: ByteStream) -> None:
    loop = asyncio.get_running_loop()
    await _ready(stream, loop.add_reader, loop.remove_reader)


async def _writable(stream: ByteStream) -> None:
    loop = asyncio.get_running_loop()
    await _ready(stream, loop.add_writer, loop.remove_writer)


async def _ready(stream: ByteStream, add: Callable[..., Any], remove: Callable[[ByteStream], object]) -> None:
    ready = asyncio.get_running_loop().create_future()

    def is_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(stream, is_ready)
    try:
        await ready
    finally:
        with suppress(ValueError):  # it was closed meanwhile
            remove(stream)


class Strangers:
    """Logs connections that were refused, like refused calls: at DEBUG, and at most one line a second.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quiet_until_s = clock()
        self._unlogged = 0

    def refused(self, peer: str, cause: object) -> None:
        """A connection was refused."""
        if self._clock() < self._quiet_until_s:
            self._unlogged += 1
            return
        self._quiet_until_s = self._clock() + _LOG_EVERY_S
        more, self._unlogged = self._unlogged, 0
        what = event("data_connection_refused", peer=peer, cause=str(cause), others=more)
        also = f"; {more} others since the last such line" if more else ""
        _log.debug("a data connection from %s is refused: %s%s", peer, cause, also, extra=what)
