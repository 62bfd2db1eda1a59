"""Data connections: which workers get one; a push on one is like any other; losing one loses nothing."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest

from ma_client import DataSettings, Outcome, Security
from ma_client.transports.connection import Connection
from ma_client.transports.data_link import DataLink, host_of
from ma_client.transports.data_socket import DataSocket
from ma_client.transports.data_transfer import Transfer
from ma_client.transports.registry import TransportSettings
from ma_client.transports.staging import Memory, Staging
from modelaverage import wire
from modelaverage.access.channels import Access
from modelaverage.manifest import Manifest, Variable
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports import data_port
from tests.centers import zeros
from tests.conftest import StartServer
from tests.cut_connection import break_after
from tests.jobs import CENTER, COUNT, STEP, Job, of
from tests.pairs import MODEL, SETTINGS, Pair
from tests.raw_client import RawClient, Stream, flat_bytes, fragments_of, until

TIMEOUT_S = 20.0
LOST = "DATA_CONNECTION_LOST"
SIZE_BYTES = len(flat_bytes(CENTER))


class Wire:
    """The client's end of a data connection, by hand; closed when the test ends."""

    opened: ClassVar[list[Wire]] = []

    def __init__(self, offer: pb.DataConnection, hello: bytes | None = None) -> None:
        self.opened.append(self)
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.socket.connect(("127.0.0.1", offer.port))
        self.socket.sendall(offer.key[:16] if hello is None else hello)
        self.answer = self.receive(16)

    def give(self, push_id: int, data: bytes) -> None:
        self.socket.sendall(struct.pack("<Q", push_id) + data)

    def receive(self, size_bytes: int) -> bytes:
        """This many bytes, or fewer if the stream ends."""
        try:
            return self.socket.recv(size_bytes, socket.MSG_WAITALL)
        except ConnectionResetError:
            return b""


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    yield
    for opened in Wire.opened:
        opened.socket.close()
    Wire.opened.clear()


def offer_to(job: Job, worker_id: str) -> pb.DataConnection:
    """What the server offers in the admission of a push that is then given up, so that the round has nothing of it."""
    with RawClient(job.address) as client:
        stream = client.open_push()
        stream.send(job.header(worker_id, accepts_data_connection=True))
        admission = stream.receive().admission
        stream.cancel()
        until(lambda: job.client.status().connected_workers == 0, "the push is given up")
    return admission.data_connection


def connected(job: Job, worker_id: str = "a") -> Wire:
    offer = offer_to(job, worker_id)
    wire = Wire(offer)
    assert wire.answer == offer.key[16:]
    return wire


def begin(job: Job, worker_id: str = "a", **fields: object) -> Stream[pb.PushAndAverageResponse]:
    """A push whose bytes are on the data connection."""
    stream = job.client.open_push()
    stream.send(job.header(worker_id, uses_data_connection=True, **fields))
    stream.half_close()
    return stream


# A push like any other.


def test_a_push_on_a_data_connection_is_in_the_average_and_gets_it_there(job: Job) -> None:
    wire = connected(job)
    wire.give(1, flat_bytes(of(1)))
    a = begin(job)
    b = job.push("b", of(3))
    assert b.answer()[1] == flat_bytes(of(2))
    outcome, inline = a.answer()
    assert (outcome.outcome, outcome.global_step, inline) == (pb.OUTCOME_COMMITTED, STEP + 1, b"")
    assert wire.receive(SIZE_BYTES) == flat_bytes(of(2))
    status = job.client.worker("a")
    assert (status.transport, status.pushes_counted) == (pb.TRANSPORT_DATA_CONNECTION, 1)
    assert job.client.worker("b").transport == pb.TRANSPORT_TCP


def test_the_call_of_a_push_on_a_data_connection_may_be_answered_in_one_message(job: Job) -> None:
    wire = connected(job)
    wire.give(1, flat_bytes(of(1)))
    a = begin(job, accepts_combined=True)
    job.push("b", of(3)).answer()
    assert [field.name for field, _ in a.receive().ListFields()] == ["admission", "outcome"]
    assert a.ended()
    assert wire.receive(SIZE_BYTES) == flat_bytes(of(2))


def test_fragments_of_the_average_come_while_later_ones_still_go_up(job: Job) -> None:
    wire = connected(job)
    begin(job)
    b, _ = job.admitted("b")
    fragments, average = fragments_of(of(1)), fragments_of(of(2))
    wire.give(1, b"")
    for index, data in enumerate(fragments):
        b.give(fragments_of(of(3)), index, index + 1)
        wire.socket.sendall(data)
        assert wire.receive(len(data)) == average[index]


def test_a_connection_serves_one_push_after_another(job: Job) -> None:
    wire = connected(job)
    for step in range(3):
        wire.give(step + 1, flat_bytes(of(step)))
        a = begin(job, push_id=step + 1, base_step=STEP + step)
        job.push("b", of(step + 2), push_id=step + 1, base_step=STEP + step).answer()
        assert a.answer()[0].outcome == pb.OUTCOME_COMMITTED
        assert wire.receive(SIZE_BYTES) == flat_bytes(of(step + 1))


# Which workers get one.


def test_only_a_client_that_wants_a_connection_is_offered_one(job: Job) -> None:
    stream = job.client.open_push()
    stream.send(job.header("a"))
    assert not stream.receive().admission.HasField("data_connection")


def test_the_key_opens_one_connection_and_no_other(job: Job) -> None:
    offer = offer_to(job, "a")
    assert Wire(offer, hello=bytes(16)).answer == b""
    assert Wire(offer, hello=offer.key[16:]).answer == b""
    assert Wire(offer).answer == offer.key[16:]
    assert Wire(offer).answer == b""
    assert job.center() == flat_bytes(CENTER)


def test_a_key_is_for_the_process_that_it_was_given_to(job: Job) -> None:
    connected(job, "a")
    assert begin(job, "b").refusal().reason == LOST
    assert begin(job, "a", incarnation=b"another process!").refusal().reason == LOST


def test_a_client_that_connects_and_says_nothing_is_sent_away(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "_GREETING_TIMEOUT_S", 0.1)
    assert Wire(offer_to(job, "a"), hello=b"").answer == b""
    connected(job)


def test_a_worker_that_leaves_takes_its_connection_along(job: Job) -> None:
    wire = connected(job)
    leaving = job.client.open_leave()
    leaving.send(pb.LeaveRequest(worker_id="a", incarnation=job.header("a").header.incarnation))
    leaving.receive()
    assert wire.receive(1) == b""


# When a connection is lost, nothing else is lost or changed.


def test_a_push_on_a_connection_that_is_not_there_is_refused_and_may_come_in_messages(job: Job) -> None:
    assert begin(job).refusal().reason == LOST
    a, b = job.push("a", of(1)), job.push("b", of(3))
    for stream in (a, b):
        assert stream.answer()[1] == flat_bytes(of(2))
    assert job.client.status().rounds_restarted == 0


@pytest.mark.parametrize("given", [0, 1, COUNT - 1])
def test_after_a_connection_broke_the_same_push_is_asked_for_the_rest(job: Job, given: int) -> None:
    wire = connected(job)
    a = begin(job)
    fragments = fragments_of(of(1))
    wire.give(1, b"".join(fragments[:given]) + fragments[given][:5])
    job.given("a", given)
    wire.socket.close()
    assert a.refusal().reason == LOST
    again, first = job.admitted("a")
    assert first == given
    again.give(fragments, first)
    again.half_close()
    b = job.push("b", of(3))
    for stream in (again, b):
        assert stream.answer()[1] == flat_bytes(of(2))
    assert job.client.status().rounds_restarted == 0


def test_bytes_of_another_push_are_refused(job: Job) -> None:
    wire = connected(job)
    wire.give(2, flat_bytes(of(1)))
    assert begin(job).refusal().reason == LOST
    assert job.client.worker("a").fragments_given == 0
    assert wire.receive(1) == b""


def test_a_stale_push_gets_the_center_in_messages(job: Job) -> None:
    wire = connected(job)
    wire.give(1, flat_bytes(of(7)))
    outcome, center = begin(job, base_step=STEP - 1).answer()
    assert (outcome.outcome, center) == (pb.OUTCOME_STALE, flat_bytes(CENTER))
    assert wire.receive(1) == b""


def test_a_connection_on_which_nothing_comes_is_cut_off(start_server: StartServer) -> None:
    address = start_server(2, stall_timeout_s=0.3).address
    with RawClient(address) as client:
        job = Job(client, address)
        wire = connected(job)
        assert begin(job).refusal().reason == LOST
        assert wire.receive(1) == b""


def test_a_client_that_does_not_read_holds_up_nobody_but_itself(start_server: StartServer) -> None:
    address = start_server(2, stall_timeout_s=0.5).address
    big = {"w": np.zeros(4 << 20, np.float32)}  # more than the kernel buffers for a peer that does not read
    with RawClient(address) as client:
        job = Job(client, address, big, fragment_size_bytes=1 << 20)
        wire = connected(job)
        a = begin(job)
        threading.Thread(target=wire.give, args=(1, flat_bytes(big)), daemon=True).start()
        b = client.open_push()
        b.send(job.header("b"))
        b.admission()
        b.give(fragments_of(big, 1 << 20))
        b.half_close()
        assert b.answer()[0].outcome == pb.OUTCOME_COMMITTED
        assert a.refusal().reason == LOST


# The session.


@pytest.fixture
def pair(start_server: StartServer) -> Iterator[Pair]:
    pair = Pair(start_server(2).address)
    yield pair
    pair.close()


def test_a_session_moves_on_to_a_data_connection_and_stays_there(pair: Pair) -> None:
    pair.until_connected()
    for _ in range(5):
        pair.round()
        assert pair.transports == {pb.TRANSPORT_DATA_CONNECTION}


@pytest.mark.parametrize("after_bytes", [0, 1, 7, 8, 9, 300, 2000, 2815, 2823])
@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_session_whose_connection_breaks_anywhere_loses_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, direction: str, after_bytes: int
) -> None:
    pair.until_connected()
    with monkeypatch.context() as patch:
        break_after(patch, direction, after_bytes)
        outcomes = {result.outcome for result in pair.round()}
    assert outcomes <= {Outcome.COMMITTED, Outcome.ALREADY_COUNTED}
    pair.until_connected()


def test_a_connection_that_breaks_at_the_barrier_is_not_taken_for_a_server_that_is_away(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.until_connected()
    used: dict[str, DataSocket] = {}
    begin_push = DataSocket.begin

    def begin_noted(self: DataSocket) -> None:
        used["last"] = self
        begin_push(self)

    monkeypatch.setattr(DataSocket, "begin", begin_noted)
    with ThreadPoolExecutor(1) as thread, RawClient(pair.sessions[0].ps_hosts[0]) as client:
        alone = thread.submit(pair.sessions[0].push_and_average, MODEL)
        until(lambda: client.worker("worker-0").waiting, "it waits at the barrier")
        used["last"].break_off()
        until(lambda: client.status().pushes_retried > 0, "it pushes again")
        pair.sessions[1].push_and_average(MODEL)
        assert alone.result(TIMEOUT_S).outcome is Outcome.COMMITTED


def test_a_center_is_whole_until_the_next_one_begins_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataSocket, "begin", lambda _: None)  # a pair of sockets has no way
    ours, theirs = socket.socketpair()
    manifest = Manifest((Variable("w", "float32", (4,)),), 8)
    staging = Staging(manifest, Memory(manifest.buffer_size_bytes))
    with theirs:
        transfer = Transfer(DataSocket(ours), zeros(staging))
        transfer.start()
        assert len(theirs.recv(24, socket.MSG_WAITALL)) == 24
        assert not staging.is_torn
        theirs.sendall(bytes(5))
        until(lambda: staging.is_torn, "it begins to come")
        transfer.end()
    assert not transfer.is_whole


def test_a_session_that_cannot_reach_the_port_goes_on_in_messages_and_does_not_ask_again_at_once(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def unreachable(host: str, offer: pb.DataConnection, *_: object) -> DataSocket:
        tried.append((host, offer.port))
        raise TimeoutError

    monkeypatch.setattr(DataSocket, "open", unreachable)
    with Pair(start_server(2).address, DataSettings(least_bytes=0)) as pair:
        for _ in range(4):
            pair.round()
        assert pair.transports == {pb.TRANSPORT_TCP}
    assert len(tried) == 2  # one a worker


# Offers that the client refuses.


class Offering:
    """Commits every push as if it were alone, and offers a data connection to every worker that pushes."""

    def __init__(self, port: int) -> None:
        self.headers: list[pb.PushHeader] = []
        self._offer = pb.DataConnection(port=port, key=bytes(32))

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        method = grpc.stream_stream_rpc_method_handler(
            self._push, pb.PushAndAverageRequest.FromString, pb.PushAndAverageResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(wire.SERVICE, {"PushAndAverage": method})

    def _push(
        self, requests: Iterator[pb.PushAndAverageRequest], _: grpc.ServicerContext
    ) -> Iterator[pb.PushAndAverageResponse]:
        self.headers.append(next(requests).header)
        yield pb.PushAndAverageResponse(admission=pb.PushAdmission(data_connection=self._offer))
        yield pb.PushAndAverageResponse(fragment=next(requests).fragment)
        yield pb.PushAndAverageResponse(outcome=pb.PushOutcome(outcome=pb.OUTCOME_COMMITTED))


@pytest.mark.parametrize(("least_bytes", "asks"), [(0, True), (1 << 20, False)])
def test_a_data_connection_that_was_not_asked_for_is_not_opened(least_bytes: int, asks: bool) -> None:
    manifest = Manifest((Variable("w", "float32", (2,)),), 8)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as threads:
        listener.settimeout(TIMEOUT_S)
        offering = Offering(listener.getsockname()[1])
        server = grpc.server(threads, [offering.handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        before = set(threading.enumerate())
        ways = TransportSettings(data=DataSettings(least_bytes=least_bytes))
        connection = Connection(f"127.0.0.1:{port}", Access(Security()), ways)
        staging = Staging(manifest, Memory(manifest.buffer_size_bytes))
        header = pb.PushHeader(push_id=1)
        connection.push_and_average(header, [memoryview(b"2 floats")], staging, Deadline(TIMEOUT_S))
        assert [header.accepts_data_connection for header in offering.headers] == [asks]
        opening = [
            thread for thread in threading.enumerate() if thread not in before and thread.name == "data-connection"
        ]
        assert bool(opening) == asks
        if asks:
            listener.accept()[0].close()
        connection.close()
        server.stop(None).wait(TIMEOUT_S)


@pytest.mark.parametrize("offered", [1, 2])
def test_an_offer_is_taken_once(monkeypatch: pytest.MonkeyPatch, offered: int) -> None:
    opened = queue.SimpleQueue[int]()

    def noted(_: str, offer: pb.DataConnection, *__: object) -> DataSocket:
        opened.put(offer.port)
        return DataSocket(socket.socket())

    monkeypatch.setattr(DataSocket, "open", noted)
    link = DataLink("127.0.0.1:1", None, SETTINGS)
    assert link.wants(1 << 30)
    for port in range(offered):
        link.open(pb.DataConnection(port=port))
    assert opened.get(timeout=TIMEOUT_S) == 0
    for thread in threading.enumerate():
        if thread.name == "data-connection":
            thread.join(TIMEOUT_S)
    assert opened.empty()
    link.close()


def test_closing_a_session_ends_a_push_on_a_data_connection(pair: Pair) -> None:
    pair.until_connected()
    with ThreadPoolExecutor(1) as thread:
        alone = thread.submit(pair.sessions[0].push_and_average, MODEL)
        with RawClient(pair.sessions[0].ps_hosts[0]) as client:
            until(lambda: client.worker("worker-0").waiting, "it waits at the barrier")
        pair.sessions[0].close()
        assert alone.exception(TIMEOUT_S) is not None


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("ps:2222", "ps"),
        ("10.0.0.1:2222", "10.0.0.1"),
        ("[::1]:2222", "::1"),
        ("unix:/tmp/ps.sock", None),
        ("unix-abstract:ps", None),
        ("xds:///ps", None),
        ("ps", None),
    ],
)
def test_the_host_is_that_of_the_servers_address(address: str, host: str | None) -> None:
    assert host_of(address) == host
