"""The page's connections: how many there may be, and how long each may take. Sockets in, aiohttp's protocols inside."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Connections", "MAX_CONNECTIONS"]

MAX_CONNECTIONS = 128
"""The most at once, because each takes one of the server's descriptors. Further ones wait until one ends."""
# From accepting a connection to the end of its answer; one that carries a stream may last.
_REQUEST_TIMEOUT_S = 30.0
_HANDSHAKE_TIMEOUT_S = 10.0
# After an error such as too many open files, which would come back at once.
_PAUSE_S = 1.0


class Connections:
    """Accepts connections and ends those that take too long.

    Args:
        make: makes the protocol of a connection.
        tls_context: returns the TLS context for the next connection; None: they are not encrypted.
    """

    def __init__(
        self, make: Callable[[], asyncio.Protocol], tls_context: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        self._make = make
        self._tls_context = tls_context
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._open: dict[asyncio.BaseProtocol, _Connection] = {}
        self._tasks = set[asyncio.Task[None]]()

    @property
    def is_any_open(self) -> bool:
        """Whether there is any connection."""
        return bool(self._open)

    def is_stream(self, protocol: asyncio.BaseProtocol) -> None:
        """The connection with this protocol carries a stream: it may last."""
        if protocol in self._open:
            self._open[protocol].is_stream = True

    async def accept(self, listener: socket.socket) -> None:
        """Serves all connections to ``listener``, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                own, _ = await loop.sock_accept(listener)
            except OSError:
                self._room.release()
                await asyncio.sleep(_PAUSE_S)
                continue
            except BaseException:
                self._room.release()
                raise
            task = loop.create_task(self._serve(own))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def abort(self, protocol: asyncio.BaseProtocol) -> None:
        """Ends the connection with this protocol at once."""
        if protocol in self._open:
            self._open[protocol].abort()

    async def _serve(self, own: socket.socket) -> None:
        protocol = self._make()
        connection = self._open[protocol] = _Connection(protocol)
        context = None if self._tls_context is None else self._tls_context()
        handshake_s = None if context is None else _HANDSHAKE_TIMEOUT_S
        try:
            # A client that speaks no TLS, has no certificate or goes away: nobody needs to know.
            with suppress(OSError, asyncio.TimeoutError):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection, own, ssl=context, ssl_handshake_timeout=handshake_s
                )
                await asyncio.wait((connection.closed,), timeout=_REQUEST_TIMEOUT_S)
                if not connection.is_stream:
                    connection.abort()
                await connection.closed
        finally:
            connection.abort()
            own.close()
            del self._open[protocol]
            self._room.release()


class _Connection(asyncio.Protocol):
    """Passes everything on to another protocol, and knows when the connection has closed."""

    def __init__(self, inner: asyncio.Protocol) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_stream = False
        self._inner = inner
        self._transport: asyncio.Transport | None = None

    def abort(self) -> None:
        """Ends it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._transport = None
        self._inner.connection_lost(exc)
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """See asyncio."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio."""
        self._inner.resume_writing()
