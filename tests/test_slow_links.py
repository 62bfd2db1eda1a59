"""Slow links: how much may be in flight, how long silence may last, and models over 0.5 Mbit/s between test hosts."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import modelaverage.runtime.data_sockets
from bench.hosts import Network, unavailable_because
from bench.processes import listening_at, serve_command
from ma_client.transports.data_socket import DataSocket
from modelaverage.runtime.data_sockets import Pace
from modelaverage.runtime.tuning import CHANNEL_OPTIONS, GONE_AFTER_S, SILENCE_TIMEOUT_S
from ps_server.flow.serving import while_taken
from ps_server.machine.connections import Taking, taking
from tests.raw_client import until

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does not say")
# The slowest link that has to work, and what waits before it: a queue of 1 MB, and a fragment in the kernel.
SLOWEST_BYTES_PER_S = 0.5e6 / 8
AHEAD_BYTES = 1_000_000 + (1 << 20)


def test_no_timer_is_shorter_than_a_ping_takes_on_the_slowest_link() -> None:
    options = dict(CHANNEL_OPTIONS)
    ping_s = AHEAD_BYTES / SLOWEST_BYTES_PER_S
    assert options["grpc.keepalive_timeout_ms"] / 1000 == SILENCE_TIMEOUT_S > ping_s
    assert options["grpc.http2.ping_timeout_ms"] / 1000 > 2 * ping_s  # and its answer takes as long again


def test_a_peer_that_is_gone_is_noticed_within_a_minute() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"] == GONE_AFTER_S * 1000 < 60_000
    assert options["grpc.http2.ping_timeout_ms"] <= 2 * GONE_AFTER_S * 1000


# Bytes in flight on a data connection.


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends; the second one buffers little."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as ours, listener.accept()[0] as theirs:
            yield ours, theirs


def link_takes(monkeypatch: pytest.MonkeyPatch, bytes_per_s: int, acknowledged_bytes: int = 1 << 20) -> None:
    measured = modelaverage.runtime.data_sockets._Measured(1000, acknowledged_bytes, bytes_per_s)
    monkeypatch.setattr(modelaverage.runtime.data_sockets, "_measured", lambda _: measured)


@on_linux
def test_no_more_is_on_its_way_than_the_link_takes_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    link_takes(monkeypatch, 200_000)
    with connected() as (ours, theirs):
        pace, sent_bytes = Pace(ours), 0
        while room_bytes := pace.room():
            sent_bytes += ours.send(bytes(min(room_bytes, 1 << 14)))
        assert 0.9 * 200_000 < pace.waiting_bytes < 1.1 * 200_000
        # As bytes are taken, more may follow.
        theirs.settimeout(5)
        while not pace.room():
            sent_bytes -= len(theirs.recv(1 << 16))
        assert pace.waiting_bytes < 200_000


@on_linux
def test_a_fast_link_is_given_whatever_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    link_takes(monkeypatch, 100_000_000)
    with connected() as (ours, _):
        pace = Pace(ours)
        ours.setblocking(False)
        while ours.send(bytes(1 << 20)) == 1 << 20:
            assert pace.room() >= 1 << 18


@on_linux
def test_what_a_link_took_in_an_earlier_push_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    link_takes(monkeypatch, 100_000_000, acknowledged_bytes=1 << 20)
    with connected() as (ours, _):
        pace = Pace(ours)
        pace.begin()
        assert pace.room() <= 1 << 16
        link_takes(monkeypatch, 100_000_000, acknowledged_bytes=(1 << 20) + (1 << 17))
        assert pace.room() == 2_000_000  # what it takes in 20 ms


@on_linux
@pytest.mark.parametrize(
    ("bytes_per_s", "expected"),
    [
        pytest.param(5_000_000, 1 << 18, id="slow links: pieces that are soon sent"),
        pytest.param(100_000_000, 2_000_000, id="fast ones: what they take in 20 ms"),
        pytest.param(10_000_000_000, 1 << 22, id="but not without limit"),
    ],
)
def test_pieces_are_larger_on_faster_links(monkeypatch: pytest.MonkeyPatch, bytes_per_s: int, expected: int) -> None:
    link_takes(monkeypatch, bytes_per_s)
    with connected() as (ours, _):
        assert Pace(ours).room() == expected


@on_linux
def test_a_sender_that_has_to_wait_ends_when_it_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    link_takes(monkeypatch, 1)
    with connected() as (ours, _), ThreadPoolExecutor(1) as thread:
        connection = DataSocket(ours)
        sending = thread.submit(connection.send, [bytes(1 << 22)])
        until(lambda: connection._pace.room() == 0, "it waits for room")
        connection.break_off()
        assert isinstance(sending.exception(timeout=10), OSError)


def test_other_than_tcp_goes_as_fast_as_it_can() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Pace(ours).room() >= 1 << 18
        assert not Pace(ours).moves()


# The last message of a refused call.


@on_linux
def test_what_a_client_has_taken_is_known_by_its_name() -> None:
    with connected() as (ours, theirs):
        peer = "ipv4:{}:{}".format(*ours.getpeername())
        ours.sendall(bytes(100))
        until(lambda: taking(peer) == Taking(100 + 1, 0), "all of it is acknowledged, and the handshake")
        ours.setblocking(False)
        ours.send(bytes(1 << 20))
        waiting = taking(peer)
        assert waiting is not None
        assert waiting.waiting_bytes > 0
        theirs.recv(1 << 16)
        until(lambda: (taking(peer) or waiting).goes_on_since(waiting), "it takes some")
    assert taking("unix:") is None


@pytest.mark.parametrize(
    ("taken", "waits_for_it"),
    [
        ([Taking(number * 1000, 5000) for number in range(30)], True),
        ([Taking(1000, 0)] * 30, False),
        ([Taking(1000, 5000)] * 30, False),
        ([None] * 30, False),
    ],
    ids=["a slow link", "nothing is left to take", "nothing moves", "nobody knows"],
)
def test_a_last_word_waits_as_long_as_bytes_move(taken: list[Taking | None], waits_for_it: bool) -> None:
    looks = iter(taken)

    async def play() -> None:
        last_word = asyncio.get_running_loop().create_future()

        def look() -> Taking | None:
            found = next(looks, None)
            if found is taken[-1] and waits_for_it and not last_word.done():
                last_word.set_exception(ZeroDivisionError)  # the way in which abort ends, once it was sent
            return found

        await while_taken(last_word, look, timeout_s=0.01, silence_timeout_s=0.1)

    with pytest.raises(ZeroDivisionError if waits_for_it else asyncio.TimeoutError):
        asyncio.run(play())


# Test hosts.

RATE_MBIT, QUEUE_BYTES, FAST_MBIT = 0.5, 1_000_000, 100
# With these numbers of values, earlier timers (5 s for a ping) broke calls, or the server logged that a worker took
# nothing: 11.5, 6.4 and 11.2 s of that link.
INITIALIZE, PUSH, ON_DATA_CONNECTION = ("initialize", 180_000), ("push", 100_000), ("push beside", 175_000)
WORKER = """
import json, logging, pathlib, sys, time
import numpy as np
from ma_client import DataSettings, ParameterServerSession
from modelaverage.runtime import data_sockets as data_connection
from modelaverage.v1 import parameter_server_pb2 as pb
data_connection._SHORT_WAY_US = 0  # no slow link is as short as one between test hosts
said, (address, doing, values, slow) = [], sys.argv[1:]
class Noting(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("ma_client").addHandler(Noting())
logging.getLogger("ma_client").setLevel(logging.INFO)
model = {"w": np.arange(int(values), dtype=np.float32)}
on_data_connection = lambda: session.status(60).workers[0].transport == pb.TRANSPORT_DATA_CONNECTION
with ParameterServerSession(
    [address],
    worker_id="worker-0",
    is_chief=True,
    shared_memory=False,
    fragment_size_bytes=1 << (18 if doing == "push beside" else 20),
    data_connections=DataSettings(least_bytes=1 if doing == "push beside" else 1 << 30),
) as session:
    if doing == "push beside":
        session.initialize(model)
        while not on_data_connection():
            session.push_and_average(model)
        print("ready", flush=True)
        while not pathlib.Path(slow).exists():
            time.sleep(0.01)
    began_s = time.monotonic()
    if doing == "initialize":
        session.initialize(model)
    elif doing == "push":
        session.pull()
    if doing != "initialize":
        session.push_and_average({"w": model["w"] + 1})
    print(json.dumps([time.monotonic() - began_s, on_data_connection(), said]))
"""


@pytest.fixture(scope="module")
def over_a_slow_link(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[str, int], Future[list[object]]]]:
    """The reports of the workers of jobs that run at the same time, each over a separate link."""
    reason = unavailable_because()
    if reason is not None:
        pytest.skip(reason)
    slow = tmp_path_factory.mktemp("links") / "slow"
    with ThreadPoolExecutor(3) as threads:
        yield {doing: threads.submit(_play, *doing, slow) for doing in (INITIALIZE, PUSH, ON_DATA_CONNECTION)}


def _play(doing: str, values: int, slow: Path) -> list[object]:
    with Network(2, FAST_MBIT) as network:
        worker, server = network.hosts
        serve = [*serve_command(f"{server.address}:2222", 1), "--insecure"]
        serving = server.popen(["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *serve])
        assert "--insecure" in (serving.stdout or sys.stdin).readline()
        address = listening_at(serving)
        command = [sys.executable, "-c", WORKER, address]
        if doing == "push":
            assert server.popen([*command, "initialize", str(values), ""]).wait(timeout=30) == 0
        if doing != "push beside":
            network.slow_down(RATE_MBIT, QUEUE_BYTES)
        working = worker.popen([*command, doing, str(values), str(slow)])
        assert working.stdout is not None
        if doing == "push beside":
            assert working.stdout.readline() == "ready\n"
            network.slow_down(RATE_MBIT, QUEUE_BYTES)
            slow.touch()
        found: list[object] = json.loads(working.communicate(timeout=60)[0])
        serving.terminate()
        by_server = serving.communicate(timeout=20)[0].splitlines()
    # Lines about workers that come and go say nothing about the link.
    usual = ("data connections at", "has left without having finished", "there is no center yet")
    return [*found, [line for line in by_server if not any(words in line for words in usual)]]


@pytest.mark.long
@pytest.mark.parametrize("doing", [INITIALIZE, PUSH, ON_DATA_CONNECTION], ids=lambda doing: str(doing[0]))
def test_a_model_gets_over_a_slow_link_without_a_break(
    over_a_slow_link: dict[tuple[str, int], Future[list[object]]], doing: tuple[str, int]
) -> None:
    lasted_s, on_data_connection, said, said_by_server = over_a_slow_link[doing].result()
    assert (said, said_by_server) == ([], [])
    assert on_data_connection is (doing == ON_DATA_CONNECTION)
    assert isinstance(lasted_s, float)
    assert lasted_s > doing[1] * 4 / SLOWEST_BYTES_PER_S
