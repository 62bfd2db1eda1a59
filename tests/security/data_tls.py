"""Both ends of data connections over TLS, without a job around them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ma_client.transports.data_settings import DataSettings
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.channels import Access
from modelaverage.access.security import Security, Tls
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.credentials import ServerTls
from ps_server.transports.data_port import DataPort, Place
from tests.certificates import Identity

__all__ = ["PLACE", "TIMEOUT_S", "client_context", "connected", "offer_of", "open_port", "play", "raw_client"]

TIMEOUT_S = 20.0
PLACE = Place("a", b"a process")
_SETTINGS = DataSettings(connect_timeout_s=TIMEOUT_S)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """Runs a scenario on an event loop, which must have nothing to complain about."""
    problems = list[object]()

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
        await asyncio.wait_for(scenario(), 2 * TIMEOUT_S)

    asyncio.run(watched())
    assert problems == []


@contextmanager
def open_port(server: Identity, client_ca: Path | None = None, max_connections: int = 1) -> Iterator[DataPort]:
    """A port with this certificate; with an authority, its clients need a certificate."""
    port = DataPort(max_connections)
    port.listen(["127.0.0.1"], 0, ServerTls(server.cert, server.key, client_ca).context)
    try:
        yield port
    finally:
        port.close()


def offer_of(port: DataPort) -> pb.DataConnection:
    offer = port.offer_to(PLACE)
    assert offer is not None
    return offer


async def connected(port: DataPort, tls: Tls, offer: pb.DataConnection | None = None) -> DataSocket:
    """A worker's end of a new connection, opened as a session opens it."""
    encryption = Access(Security(tls)).encryption("127.0.0.1:1")
    assert encryption is not None
    offer = offer_of(port) if offer is None else offer
    return await asyncio.to_thread(DataSocket.open, "127.0.0.1", offer, _SETTINGS, encryption)


def client_context(ca: Path, identity: Identity | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if identity is not None:
        context.load_cert_chain(identity.cert, identity.key)
    return context


def raw_client(port: int, context: ssl.SSLContext | None, words: bytes) -> bytes:
    """What a server answers to these words; empty if it hangs up, or never begins."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        try:
            if context is not None:
                with context.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
                    secure.sendall(words)
                    return secure.recv(1000)
            if words:
                connection.sendall(words)
            answer = connection.recv(1000)
            # In plain text a server may say nothing but a TLS alert.
            return b"" if answer[:1] == b"\x15" else answer
        except (ssl.SSLError, ConnectionError):
            return b""
