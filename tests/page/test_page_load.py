"""The load that browsers make: how many streams there may be, and slow, hanging and absent readers."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from itertools import pairwise

import pytest
from aiohttp import web

from ps_server.flow.service import ParameterServerService
from ps_server.page import app, feed
from ps_server.page import connections as page_connections
from ps_server.page.app import MAX_STREAMS
from ps_server.page.connections import Connections
from ps_server.seen.sample import PageSample
from tests.conftest import RunningServer, StartServer
from tests.launched import Launched
from tests.page.conftest import PAGE
from tests.page.reading import ask, place_of, stream
from tests.raw_client import DEADLINE_S, until


def test_one_stream_too_many_is_refused_by_name(server: RunningServer) -> None:
    with ExitStack() as stack:
        pages = [stack.enter_context(stream(server.page_url)) for _ in range(MAX_STREAMS)]
        assert not _can_stream(server.page_url)
        answer = ask(server.page_url, "/api/stream")
        assert (answer.status, answer.json["error"]) == (503, f"{MAX_STREAMS} streams are open")
        for page in pages:
            page.pair()
    until(lambda: _can_stream(server.page_url), "a closed window makes room")


def _can_stream(url: str) -> bool:
    try:
        with stream(url) as page:
            page.pair()
    except AssertionError:
        return False
    return True


def test_no_sample_is_taken_while_nobody_looks(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, sample = list[float](), ParameterServerService.page_sample

    def counted(service: ParameterServerService) -> PageSample:
        taken.append(time.monotonic())
        return sample(service)

    monkeypatch.setattr(ParameterServerService, "page_sample", counted)
    server = start_server(2, page=PAGE)
    at_start = len(taken)
    with ExitStack() as stack:
        pages = [stack.enter_context(stream(server.page_url)) for _ in range(5)]
        for page in [*pages, *pages, *pages]:
            page.pair()
    looked = taken[at_start:]
    # However many look: at most one an interval.
    assert all(after - before > 0.8 * PAGE.interval_s for before, after in pairwise(looked))
    until(lambda: _is_still(taken), "nothing asks any more")


def _is_still(taken: list[float]) -> bool:
    return time.monotonic() - taken[-1] > 6 * PAGE.interval_s


def test_a_reader_that_takes_nothing_neither_fills_the_memory_nor_holds_up_others(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"{}" + b" " * 2**20
    monkeypatch.setattr(feed, "status_json", lambda *_: large)
    streams, is_stream = list[asyncio.BaseProtocol](), Connections.is_stream

    def noted(connections: Connections, protocol: asyncio.BaseProtocol) -> None:
        streams.append(protocol)
        is_stream(connections, protocol)

    monkeypatch.setattr(Connections, "is_stream", noted)
    with socket.create_connection(place_of(server.page_url)) as hanging:
        hanging.sendall(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: len(streams) == 1, "it has begun")
        (connection,) = streams
        assert isinstance(connection, web.RequestHandler)
        with stream(server.page_url) as page:
            for _ in range(20):
                page.pair()
        assert connection.transport is not None
        assert connection.transport.get_write_buffer_size() < 2 * len(large)
        started_at_s = time.monotonic()
        server.stop()
        assert time.monotonic() - started_at_s < 15  # a busy machine; a client may take a minute for its request


def test_a_reader_that_takes_nothing_for_long_loses_its_stream(
    seen: list[Connections], server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (connections,) = seen
    monkeypatch.setattr(feed, "status_json", lambda *_: b"{}" + b" " * (16 << 20))  # more than the kernel takes
    monkeypatch.setattr(app, "_WRITE_TIMEOUT_S", 0.2)
    with socket.create_connection(place_of(server.page_url)) as hanging:
        hanging.sendall(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: connections.is_any_open, "it has begun")
        until(lambda: not connections.is_any_open, "it has ended")


def test_a_request_that_never_ends_loses_its_connection_and_a_stream_lasts(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_connections, "_REQUEST_TIMEOUT_S", 0.3)
    with stream(server.page_url) as page, socket.create_connection(place_of(server.page_url)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        began_s, ended = time.monotonic(), False
        while not ended:  # a byte at a time, as long as the server takes them
            page.pair()
            try:
                slow.sendall(b"y")
            except OSError:
                ended = True
        assert time.monotonic() - began_s < 5  # aiohttp's own limit is 10 s
        page.pair()


def test_clients_that_hang_do_not_keep_the_server_from_ending() -> None:
    arguments = [
        "-m",
        "ps_server",
        "serve",
        "--bind",
        "127.0.0.1:0",
        "--num-workers",
        "1",
        "--page-bind",
        "127.0.0.1:0",
    ]
    with Launched(arguments) as server, ExitStack() as stack:
        server.wait_for("page at http://127.0.0.1:")
        url = server.lines[-1].split()[-1]
        for begun in (b"", b"GET / HT", b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            hanging = stack.enter_context(socket.create_connection(place_of(url)))
            hanging.sendall(begun)
        pages = [stack.enter_context(stream(url)) for _ in range(5)]
        for page in pages:
            page.pair()
        started_at_s = time.monotonic()
        server.process.terminate()
        assert server.ended() == 0
        assert time.monotonic() - started_at_s < 15  # a busy machine; a client may take a minute for its request
        assert server.errors == []


def test_a_server_that_is_stuck_answers_503(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_SAMPLE_TIMEOUT_S", 0.05)
    released = asyncio.Event()

    def stuck() -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not released.is_set() and time.monotonic() < deadline_s:
            time.sleep(0.005)

    server.loop.call_soon_threadsafe(stuck)
    try:
        answer = ask(server.page_url, "/api/status")
        assert answer.status == 503
        assert ask(server.page_url, "/").status == 200  # the page's own thread goes on
    finally:
        released.set()
    until(lambda: ask(server.page_url, "/api/status").status == 200, "it answers again")
