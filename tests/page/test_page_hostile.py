"""Hostile bytes at the page's port: rounds go on, the page goes on, and nothing of them stays."""

from __future__ import annotations

import logging
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ps_server.page.connections import MAX_CONNECTIONS, Connections
from tests.conftest import RunningServer
from tests.jobs import STEP, Job
from tests.page.conftest import a_round
from tests.page.reading import ask, document, place_of, stream
from tests.raw_client import until

# The first of each is right; each request has at most a few that are wrong, so that many get past the parser.
METHODS = ["GET", "HEAD", "POST", "OPTIONS", "CONNECT", "PRI", "GE T", ""]
PATHS = ["/api/status", "/", "/api/rounds?since=", "/api/stream", "/static/", "/?token=", "//", "*", "http://evil/", ""]
TAILS = ["", "7", "%ff%00", "?" + "&=" * 500, "/../..", "\u00e9", "x" * 9000]
VERSIONS = ["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "", "\x16\x03\x01"]
HOSTS = ["Host: localhost", "Host: evil.example", "Host:", "Host: [::1", "Host: localhost\r\nHost: localhost", "X: y"]
HEADERS = [
    "Accept: */*",
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Content-Encoding: br",
    "Expect: 100-continue",
    "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    "Connection: keep-alive",
    "Range: bytes=0-",
    "Authorization: Bearer " + "x" * 5000,
    "Authorization: \u00e9",
    "Cookie: " + "a=b; " * 1000,
    'Cookie: ma_page="\\377\\; \u00e9=;;=',
    "X: " + "y" * 9000,
    " folded: z",
    "no colon",
    "\x00: \x00",
    "Last-Event-ID: 1\r2",
    "Sec-Fetch-Site: cross-site",
]
ENDS = ["\r\n", "\n", "\r"]
BODIES = [b"", b"hello", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"5\r\nhello\r\n", b"GET / HTTP/1.1\r\n\r\n" * 50]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something like a request, or several, or a part of one."""
    choices = [METHODS, PATHS, TAILS, VERSIONS, HOSTS, HEADERS, HEADERS, ENDS]
    wrong = draw(st.sets(st.integers(0, len(choices) - 1), max_size=3))
    method, path, tail, version, host, one, other, end = (
        draw(st.sampled_from(choice)) if number in wrong else choice[0] for number, choice in enumerate(choices)
    )
    head = end.join([f"{method} {path}{tail} {version}", host, one, other, "", ""])
    whole = (head.encode() + draw(st.sampled_from(BODIES))) * draw(st.sampled_from([1, 1, 1, 3]))
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 4)) == 4 else whole


def test_hostile_requests_change_nothing_and_leave_nothing_behind(
    seen: list[Connections], server: RunningServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    (connections,), place = seen, place_of(server.page_url)
    a_round(job, STEP)
    before = document(server.page_url, "/api/rounds")["rounds"]

    @settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck), database=None)
    @given(parts=st.lists(requests() | st.binary(max_size=60), max_size=3), waits=st.booleans())
    def attack(parts: list[bytes], waits: bool) -> None:
        with socket.create_connection(place, timeout=0.05) as hostile:
            try:
                for part in parts:
                    hostile.sendall(part)
                if waits:
                    hostile.recv(1000)
            except OSError:  # it has hung up, or waits for more
                return

    with caplog.at_level(logging.DEBUG):
        attack()
        assert document(server.page_url, "/api/rounds")["rounds"] == before
        a_round(job, STEP + 1)
        with stream(server.page_url) as page:
            while page.pair()[0]["status"]["global_step"] < STEP + 2:
                pass
        assert not [record for record in caplog.records if record.name.startswith(("aiohttp", "page"))]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    until(lambda: not connections.is_any_open, "no connection stays")


def test_connections_that_send_nothing_keep_no_browser_out_for_long(
    server: RunningServer,
) -> None:
    place = place_of(server.page_url)
    idle = [socket.create_connection(place) for _ in range(MAX_CONNECTIONS)]
    try:
        with socket.create_connection(place, timeout=0.3) as waiting:
            waiting.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with pytest.raises(TimeoutError):
                waiting.recv(1)  # it waits until one of the others ends
            idle.pop().close()
            waiting.settimeout(10)
            assert waiting.recv(12) == b"HTTP/1.1 200"
    finally:
        for each in idle:
            each.close()
    assert ask(server.page_url).status == 200
