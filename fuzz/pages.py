"""Spoiled HTTP requests for the server's page, over real sockets: what must not be told to a stranger is in every
document, and no request has both the token and a host name that the page knows."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import AsyncExitStack
from random import Random
from urllib.parse import urlsplit

from fuzz.context import Failure
from fuzz.mutate import mutated
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.security import ServerSecurity
from ps_server.page.thread import PageConfig, serve_page
from ps_server.rules.authorization import Role, Tokens
from ps_server.seen.history import HistorySeen
from ps_server.seen.sample import PageSample
from ps_server.seen.traffic import Traffic

__all__ = ["PageRequests"]

_SECRET = b"worker-of-whom-no-stranger-knows"
_TOKEN = "t" * 40
_GOOD = f"GET /api/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {_TOKEN}\r\nConnection: close\r\n\r\n"
_PATHS = ("/", "/api", "/api/status", "/api/rounds?since=3", "/api/rounds.csv", "/api/stream", "/static/main.js", "/x")
_CREDENTIALS = ("", "Authorization: Bearer x\r\n", f"Authorization: Basic {_TOKEN}\r\n", "Cookie: ma_page_1=x; y\r\n")
_BODIES = (b"", b"", b"", b"0\r\n\r\n", b"5\r\nhello\r\n", b"hello")
_HEADERS = ("", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "Expect: 100-continue\r\n")
_ANSWER_S = 0.05
_GOOD_ANSWER_S = 10.0


class PageRequests:
    """Requests without the token, or with it and the name of another host, of which a few bytes have been changed. See
    `Target`."""

    inputs_per_world = 5_000  # aiohttp keeps what it has of a page as long as the process lives
    inputs_each = 20

    def __init__(self, seed: int, name: str) -> None:
        self.name = name
        self.endings = Counter[str]()
        self._seed = seed
        self._worlds: list[tuple[asyncio.AbstractEventLoop, AsyncExitStack, tuple[str, int]]] = []
        self._problems = list[object]()

    def begin(self, number: int) -> None:  # noqa: ARG002
        """See `Target`."""
        self._end()
        loop, stack = asyncio.new_event_loop(), AsyncExitStack()
        loop.set_exception_handler(lambda _, problem: self._problems.append(problem))
        self._worlds = [(loop, stack, loop.run_until_complete(_served(stack)))]

    def play(self, number: int) -> None:
        """See `Target`."""
        loop, _, place = self._worlds[0]
        rng = Random(f"{self._seed} {self.name} {number}")
        loop.run_until_complete(self._play(rng, place))
        if self._problems:
            raise Failure(f"the event loop complains: {self._problems}")

    def finish(self) -> dict[str, int]:
        """See `Target`."""
        loop, _, place = self._worlds[0]
        answer = loop.run_until_complete(_answer(place, _GOOD.encode(), _GOOD_ANSWER_S))
        self._end()
        if _SECRET not in answer:
            raise Failure(f"a good request was answered with {answer[:100]!r}")
        return {}

    def _end(self) -> None:
        for loop, stack, _ in self._worlds:
            loop.run_until_complete(stack.aclose())
            loop.close()
        self._worlds = []

    async def _play(self, rng: Random, place: tuple[str, int]) -> None:
        request = _request(rng)
        answer = await _answer(place, request, _ANSWER_S)
        status = answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.") else ""
        self.endings[status or ("(no HTTP)" if answer else "(no answer)")] += 1
        if _SECRET in answer and not (_TOKEN.encode() in request and b"localhost" in request):
            raise Failure(f"{request!r} was answered with {answer[:2000]!r}")
        if status == "500":
            raise Failure(f"the page fails at {request!r}: {answer!r}")


def _request(rng: Random) -> bytes:
    host, credentials = "localhost", rng.choice(_CREDENTIALS)
    if rng.random() < 0.3:
        host, credentials = "evil.example", f"Authorization: Bearer {_TOKEN}\r\n"
    head = f"{rng.choice(('GET', 'GET', 'POST', 'HEAD'))} {rng.choice(_PATHS)} HTTP/1.1\r\nHost: {host}\r\n"
    whole = f"{head}{credentials}{rng.choice(_HEADERS)}Connection: close\r\n\r\n".encode() + rng.choice(_BODIES)
    for _ in range(rng.choice((0, 0, 1, 2))):
        whole = mutated(
            rng, whole, [b"Host: localhost\r\n\r\n", b"\r\n\r\nGET / HTTP/1.1\r\n", b"?token=x", b"\x16\x03\x01"]
        )
    return whole


async def _answer(place: tuple[str, int], request: bytes, timeout_s: float) -> bytes:
    """All that came until the page hung up; after ``timeout_s``, what came by then."""
    reader, writer = await asyncio.open_connection(*place)
    came = bytearray()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        writer.write(request)
        await asyncio.wait_for(_read(reader, came), timeout_s)
    writer.close()
    return bytes(came)


async def _read(reader: asyncio.StreamReader, into: bytearray) -> None:
    while part := await reader.read(1 << 16):
        into += part


async def _served(stack: AsyncExitStack) -> tuple[str, int]:
    status = pb.GetStatusResponse(waiting_for=[_SECRET.decode()])
    sample = PageSample(status, HistorySeen(), Traffic(), 1.0, 0.0)
    tokens = Tokens({_TOKEN: Role.READER})
    config = PageConfig("127.0.0.1:0", interval_s=0.01)
    page = serve_page(config, ServerSecurity(), None, lambda: tokens, lambda: sample, "127.0.0.1:1")
    parts = urlsplit(await stack.enter_async_context(page))
    return str(parts.hostname), int(parts.port or 0)
