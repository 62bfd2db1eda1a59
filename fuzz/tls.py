"""Spoiled handshakes and keys for a data port with mutual TLS, over real sockets: TLS cannot do without them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from fuzz.context import Failure
from fuzz.mutate import mutated
from modelaverage.access.contexts import server_context
from modelaverage.runtime.data_sockets import halves
from ps_server.transports.data_port import _GREETINGS_AT_ONCE, DataPort, Place
from tests.certificates import Authority

__all__ = ["TlsHandshakes"]

_PLACE = Place("a", b"a process")
_TIMEOUT_S = 20.0


class TlsHandshakes:
    """A client whose certificate and key are good, and of whose bytes one flight has been changed. See `Target`."""

    inputs_per_world = 50
    inputs_each = 20

    def __init__(self, seed: int, name: str) -> None:
        self.name = name
        self.endings = Counter[str]()
        self._seed = seed
        with tempfile.TemporaryDirectory() as directory:
            authority = Authority(Path(directory))
            server, client = authority.sign("server"), authority.sign("client")
            self._server = server_context(server.cert, server.key, authority.ca.read_bytes())
            self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._client.load_verify_locations(authority.ca)
            self._client.load_cert_chain(client.cert, client.key)
        self._worlds: list[tuple[asyncio.AbstractEventLoop, DataPort]] = []
        self._problems = list[object]()

    def begin(self, number: int) -> None:  # noqa: ARG002
        """See `Target`."""
        self._end()
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, problem: self._problems.append(problem))
        self._worlds = [(loop, loop.run_until_complete(self._opened()))]

    def play(self, number: int) -> None:
        """See `Target`."""
        loop, port = self._worlds[0]
        rng = Random(f"{self._seed} {self.name} {number}")
        loop.run_until_complete(asyncio.wait_for(self._play(rng, port), _TIMEOUT_S))
        if self._problems:
            raise Failure(f"the event loop complains: {self._problems}")

    def finish(self) -> dict[str, int]:
        """See `Target`."""
        _, port = self._worlds[0]
        self._end()
        return {"_offers": len(port._offers), "_connections": len(port._connections)}

    def _end(self) -> None:
        for loop, port in self._worlds:
            loop.run_until_complete(_closed(port))
            loop.close()
        self._worlds = []

    async def _opened(self) -> DataPort:
        port = DataPort(1)
        port.listen(["127.0.0.1"], 0, lambda: self._server)
        return port

    async def _play(self, rng: Random, port: DataPort) -> None:
        offer = port.offer_to(_PLACE)
        assert offer is not None
        hello, answer = halves(offer.key)
        spoiled = rng.choice((0, 0, 1))
        reader, writer = await asyncio.open_connection("127.0.0.1", offer.port)
        is_in, came, to_us, to_server = False, b"", ssl.MemoryBIO(), ssl.MemoryBIO()
        session = self._client.wrap_bio(to_us, to_server, server_hostname="127.0.0.1")
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        flight = to_server.read()
        if spoiled == 1:
            writer.write(flight)
            while session.version() is None:
                to_us.write(await reader.read(1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):
                    session.do_handshake()
            session.write(hello)
            flight = to_server.read()
        writer.write(mutated(rng, flight, [hello, b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(5000)]))
        with contextlib.suppress(OSError):
            writer.write_eof()
            reading = asyncio.ensure_future(reader.read())
            while not (reading.done() or port._connections):
                await asyncio.sleep(0)
            is_in = bool(port._connections)
            port._drop(_PLACE.worker_id)
            came = await reading
        writer.close()
        while port._arriving:
            await asyncio.sleep(0)
        self.endings["(let in)" if is_in else "(sent away)"] += 1
        if answer in came:
            raise Failure("the key was answered in plain text")
        if is_in and spoiled == 0:
            raise Failure("a handshake that never ended was enough")
        if port._greetings._value != _GREETINGS_AT_ONCE - 1:  # one is taken by the next accept
            raise Failure("a stranger still counts among those that are greeted")


async def _closed(port: DataPort) -> None:
    port.close()
    if port._tasks:
        await asyncio.wait(port._tasks)
