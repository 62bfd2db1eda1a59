"""A wait on a silent data connection is bounded; afterwards the connection is not used for a while."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from ma_client import DataSettings, ParameterServerSession
from ma_client.cluster.joining import join
from ma_client.transports.data_socket import DataSocket
from ma_client.transports.data_transfer import Transfer
from ma_client.transports.staging import Memory, Staging
from modelaverage.errors import DeadlineExceededError, Reason, RetryPushError, ServerUnavailableError
from modelaverage.manifest import Manifest, Variable
from modelaverage.runtime.data_sockets import prepare
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.data_connection import DataConnection as ServersEnd
from ps_server.transports.data_port import DataPort, Place
from tests.centers import zeros
from tests.conftest import StartServer
from tests.pairs import MODEL, SETTINGS, Pair
from tests.raw_client import Arrays, until
from tests.stopcock import Stopcock, data_through

TIMEOUT_S = 20.0
# Longer than any test: a wait that ends in time was ended by another limit.
LONG_S = 600.0
SILENCE_S = 1.0
ON_DATA, IN_MESSAGES = {pb.TRANSPORT_DATA_CONNECTION}, {pb.TRANSPORT_TCP}
# More than the kernel and the relay buffer for a peer that does not read.
BIG: Arrays = {"w": np.arange(2 << 20, dtype=np.float32)}


@contextmanager
def relayed(
    address: str, monkeypatch: pytest.MonkeyPatch, settings: DataSettings, model: Arrays = MODEL
) -> Iterator[tuple[Pair, Stopcock]]:
    """Two workers whose open data connections all go through one relay."""
    with Stopcock() as stopcock:
        data_through(stopcock, monkeypatch)
        with Pair(address, settings, model) as pair:
            pair.until_connected()
            yield pair, stopcock


# Every push ends in bounded time, and the average is right.


def test_a_center_that_does_not_come_after_the_outcome_comes_in_messages(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SETTINGS, silence_timeout_s=SILENCE_S, pause_s=LONG_S)
    with relayed(start_server(2, stall_timeout_s=LONG_S).address, monkeypatch, settings) as (pair, stopcock):
        stopcock.down.open.clear()
        pair.round()
        opened = stopcock.passed
        for _ in range(3):  # nothing is tried again, so nothing is lost again
            pair.round()
            assert pair.transports == IN_MESSAGES
        assert stopcock.passed == opened == 2
    waited = [words for words in caplog.messages if "nothing has moved on the data connection to 127.0.0.1" in words]
    given_up = [words for words in caplog.messages if "nothing came for 1 s; pushes to 127.0.0.1" in words]
    assert len(waited) >= len(given_up) == 2  # one a worker
    assert all("go in messages for 600 s" in words for words in given_up)


def test_a_push_that_does_not_get_through_goes_in_messages(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, silence_timeout_s=LONG_S, pause_s=LONG_S)
    with relayed(start_server(2, stall_timeout_s=0.5).address, monkeypatch, settings) as (pair, stopcock):
        stopcock.up.open.clear()
        pair.round()
        pair.round()
        assert pair.transports == IN_MESSAGES
        assert stopcock.passed == 2


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_a_push_that_nobody_reads_goes_in_messages(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataSettings(silence_timeout_s=SILENCE_S, pause_s=LONG_S)
    with relayed(start_server(2, stall_timeout_s=LONG_S).address, monkeypatch, settings, BIG) as (pair, stopcock):
        stopcock.up.open.clear()
        pair.round()
        assert pair.transports == IN_MESSAGES


def test_bytes_that_come_slowly_are_waited_for(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, silence_timeout_s=1.0, pause_s=LONG_S)
    with relayed(start_server(2).address, monkeypatch, settings) as (pair, stopcock):
        stopcock.down.slow(200, pause_s=0.1)  # 15 pauses
        pair.round()
        began_s = time.monotonic()
        pair.round()
        assert time.monotonic() - began_s > settings.silence_timeout_s
        assert pair.transports == ON_DATA
        assert stopcock.passed == 2


def test_the_server_waits_for_bytes_of_which_too_few_have_come_to_wake_it_up(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall_timeout_s, model = 1.0, {"w": np.arange(64, dtype=np.float32)}  # one fragment
    settings = replace(SETTINGS, silence_timeout_s=LONG_S, pause_s=LONG_S)
    server = start_server(2, stall_timeout_s=stall_timeout_s)
    with relayed(server.address, monkeypatch, settings, model) as (pair, stopcock):
        stopcock.up.slow(64, pause_s=0.3)  # five pauses
        pair.round()  # the relay was already waiting for more bytes at once
        began_s = time.monotonic()
        pair.round()
        assert time.monotonic() - began_s > stall_timeout_s
        assert pair.transports == ON_DATA
        assert stopcock.passed == 2


def test_a_push_that_times_out_beside_a_silent_connection_is_followed_by_pushes_in_messages(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, silence_timeout_s=LONG_S, pause_s=LONG_S)
    with relayed(start_server(2, stall_timeout_s=LONG_S).address, monkeypatch, settings) as (pair, stopcock):
        stopcock.up.open.clear()
        with pytest.raises(DeadlineExceededError):
            pair.sessions[0].push_and_average(MODEL, timeout_s=0.3)
        stopcock.up.open.set()
        pair.round()
        assert pair.transports == ON_DATA | IN_MESSAGES
        assert stopcock.passed == 2


def test_after_the_pause_a_data_connection_is_tried_again(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, silence_timeout_s=SILENCE_S, pause_s=0.1)
    with relayed(start_server(2).address, monkeypatch, settings) as (pair, stopcock):
        stopcock.down.open.clear()
        pair.round()
        stopcock.down.open.set()
        pair.until_connected()


# The ends of a connection, on their own.


def connected_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def connection_of(silence_timeout_s: float) -> tuple[DataSocket, socket.socket]:
    """A client's end with these limits, and the other end."""
    ours, theirs = connected_pair()
    prepare(ours, silence_timeout_s)
    return DataSocket(ours, silence_timeout_s), theirs


def staging_of(fragments: int) -> Staging:
    manifest = Manifest((Variable("w", "float32", (2 * fragments,)),), 8)
    return Staging(manifest, Memory(manifest.buffer_size_bytes))


def test_an_idle_connection_outlives_the_limit() -> None:
    connection, theirs = connection_of(0.1)
    with theirs:
        room = bytearray(8)
        waiting = threading.Thread(target=connection.receive, args=(memoryview(room),))
        waiting.start()
        waiting.join(0.5)  # as long as it takes for others to come
        theirs.sendall(b"the mean")
        waiting.join(TIMEOUT_S)
        assert room == b"the mean"
        connection.close()


@pytest.mark.parametrize("came", [0, 1, 15])
def test_the_wait_for_the_rest_of_a_center_ends_when_nothing_comes_and_says_so(came: int) -> None:
    connection, theirs = connection_of(0.2)
    staging = staging_of(2)
    with theirs:
        transfer = Transfer(connection, zeros(staging))
        transfer.start()
        theirs.sendall(bytes(came))
        assert not transfer.wait(lambda: True)
        transfer.end()
    assert str(transfer.problem) == "nothing came for 0.2 s"
    assert not transfer.is_whole


def test_while_a_worker_sends_nothing_the_server_says_so_and_waits_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        ours, theirs = connected_pair()
        ours.setblocking(False)
        connection = ServersEnd(ours, "a", notice_s=0.05)
        for _ in range(2):  # of every fragment
            room, said_before = bytearray(4), len(caplog.messages)
            filling = asyncio.ensure_future(connection.receive(memoryview(room)))
            while len(caplog.messages) < said_before + 2:
                await asyncio.sleep(0.01)
            theirs.sendall(b"more")
            await asyncio.wait_for(filling, TIMEOUT_S)
            assert room == b"more"
        connection.close()
        theirs.close()

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert {words.partition(" for ")[0] for words in caplog.messages} == {"'a' sends nothing on its data connection"}


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_the_server_gives_up_a_connection_whose_client_does_not_read_and_says_before_that_it_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        port = DataPort(1, silence_timeout_s=SILENCE_S)
        port.listen(["127.0.0.1"], 0)
        offer = port.offer_to(Place("a", b"a process"))
        assert offer is not None
        client = await asyncio.to_thread(DataSocket.open, "127.0.0.1", offer, SETTINGS)
        connection = port.take(Place("a", b"a process"))
        with pytest.raises(RetryPushError, match="the data connection is lost") as lost:
            await asyncio.wait_for(connection.send(memoryview(bytes(32 << 20))), TIMEOUT_S)
        assert lost.value.reason is Reason.DATA_CONNECTION_LOST
        assert "'a' reads nothing of what is sent on its data connection for" in caplog.messages[0]
        connection.close()
        client.close()
        port.close()

    asyncio.run(scenario())


def test_a_transfer_ends_whose_threads_did_not_all_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for started in (0, 1):
        connection, theirs = connection_of(LONG_S)
        with theirs, monkeypatch.context() as patch:
            few_threads(patch, started)
            transfer = Transfer(connection, zeros(staging_of(1)))
            with pytest.raises(RuntimeError, match="new thread"):
                transfer.start()
            transfer.end()
            assert not transfer.is_whole


# No threads.


def few_threads(patch: pytest.MonkeyPatch, left: int, failures: float = math.inf) -> None:
    """A few more threads start, the next few fail to, and then all start again."""
    start, counting = threading.Thread.start, itertools.count()

    def refused(self: threading.Thread) -> None:
        of_test = self.name.startswith("ThreadPoolExecutor")
        if not of_test and left <= next(counting) < left + failures:
            raise RuntimeError("can't start new thread")
        start(self)

    patch.setattr(threading.Thread, "start", refused)


@pytest.mark.parametrize("connected", [False, True])
def test_a_thread_that_does_not_start_costs_no_round(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    settings = SETTINGS if connected else DataSettings()
    with Pair(start_server(2).address, settings, reconnect_timeout_s=TIMEOUT_S) as pair:
        for left in range(8 if connected else 4):  # as many as a round starts
            if connected:
                pair.until_connected()
            with monkeypatch.context() as patch:
                few_threads(patch, left, failures=1)
                for _ in range(3):
                    pair.round()


def test_without_threads_a_call_says_so_and_with_them_the_session_goes_on(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(2)
    before = threading.enumerate()

    def has_ended() -> bool:
        return not any("(_run)" in thread.name for thread in threading.enumerate() if thread not in before)

    with Pair(server.address) as pair:
        pair.until_connected()
        for _ in range(2):
            until(has_ended, "the thread of gRPC's last call, which the next one would use, has ended")
            with monkeypatch.context() as patch:
                few_threads(patch, left=0)
                for call in (pair.sessions[0].pull, lambda: pair.sessions[0].push_and_average(MODEL)):
                    with pytest.raises(ServerUnavailableError, match=r"can't start new thread.*ulimit -u"):
                        call()
            pair.round()


WITHOUT_THREADS = """
import sys, threading
import numpy as np
from ma_client import ParameterServerSession

def refused(self):
    raise RuntimeError("can't start new thread")

session = ParameterServerSession(sys.argv[1:], worker_id="worker-0", is_chief=True, reconnect_timeout_s=0)
session.initialize({"w": np.zeros(8)})
threading.Thread.start = refused
try:
    session.push_and_average({"w": np.ones(8)})
finally:
    session.close()
"""


def test_a_process_that_gets_no_threads_ends(start_server: StartServer) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS, start_server(1).address],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 1
    assert "ServerUnavailableError: no call to" in ended.stderr.splitlines()[-1]


def test_a_session_with_several_servers_has_its_threads_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    few_threads(monkeypatch, left=2)
    with pytest.raises(ServerUnavailableError, match=r"not enough threads for 3 parameter servers.*ulimit -u"):
        ParameterServerSession(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], worker_id="worker-0")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ma_client")]


def test_without_a_thread_no_task_index_is_held_and_it_is_said(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_server(1).address
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == "ma_client-join":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(ServerUnavailableError, match=r"no task index.*can't start new thread"):
        join(address, TIMEOUT_S)
