"""A proxy that ends TLS: what comes in encrypted goes on in plain text, as behind a load balancer."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from types import TracebackType

from modelaverage.addresses import parse
from tests.certificates import Identity

__all__ = ["TlsProxy"]


class TlsProxy:
    """Listens on loopback, and passes on to ``target`` (HOST:PORT) and back.

    Args:
        target: an address without TLS.
        identity: the certificate that it shows to clients.
        client_ca: a file with the authorities of the clients' certificates; None: clients need no certificate.
    """

    def __init__(self, target: str, identity: Identity, client_ca: str | None = None) -> None:
        where = parse(target)
        self._target = where.host, where.port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.cert, identity.key)
        self._context.set_alpn_protocols(["h2"])
        if client_ca is not None:
            self._context.load_verify_locations(client_ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._context)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _pass_on(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(*self._target)
        ways = [asyncio.ensure_future(_copy(client, to_server)), asyncio.ensure_future(_copy(server, to_client))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            to_client.close()
            to_server.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
