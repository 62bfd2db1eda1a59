"""Records of TLS end where they like: no reader waits for bytes that have arrived, and keys are renewed in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ma_client.transports.data_socket import DataSocket
from modelaverage.runtime import encrypted_socket
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from tests.conftest import StartServer
from tests.pairs import Pair
from tests.raw_client import until
from tests.security.data_tls import PLACE, TIMEOUT_S, client_context, offer_of, open_port, play
from tests.security.guarded import Files

# Well below the time after which a reader looks for bytes that did not wake it up (6 s and 12 s).
SOON_S = 4.0
DATA = bytes(range(250)) * 80  # 20,000 bytes: two records, if sent at once
# How the plain bytes are cut into writes, and how the reader asks for them.
CUTS = {
    "a record arrives in two parts": ([20_000], [20_000]),
    "a record ends after what is asked for": ([20_000], [5_000, 3, 13_000, 1_997]),
    "a record ends before what is asked for": ([3, 9_000, 10_997], [20_000]),
}
# Where the encrypted bytes are cut: in the second of two records.
PART_BYTES = 18_000


class Peer:
    """TLS by hand, so that its bytes can be sent in any parts."""

    def __init__(self, context: ssl.SSLContext, is_server: bool) -> None:
        self._to_us, self._from_us = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if is_server else "127.0.0.1"
        self._session = context.wrap_bio(self._to_us, self._from_us, is_server, name)

    def shake_hands(self, connection: socket.socket) -> None:
        while True:
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                connection.sendall(self._from_us.read())
                self._to_us.write(connection.recv(1 << 16))
            else:
                connection.sendall(self._from_us.read())
                return

    def encrypted(self, writes: Sequence[int]) -> bytes:
        at = 0
        for size_bytes in writes:
            self._session.write(DATA[at : at + size_bytes])
            at += size_bytes
        return self._from_us.read()

    def hello(self, connection: socket.socket, key: bytes) -> None:
        self._session.write(key[:16])
        connection.sendall(self._from_us.read())
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                assert self._session.read(16) == key[16:]
                return
            self._to_us.write(connection.recv(1 << 16))


@pytest.mark.parametrize("cut", CUTS)
def test_the_server_wakes_up_for_the_last_bytes_of_a_fragment(files: Files, cut: str) -> None:
    writes, rooms = CUTS[cut]

    async def scenario() -> None:
        with open_port(files.server) as port, socket.socket() as client:
            offer = offer_of(port)
            peer = Peer(client_context(files.authority.ca), is_server=False)
            client.settimeout(TIMEOUT_S)
            await asyncio.to_thread(client.connect, ("127.0.0.1", offer.port))
            await asyncio.to_thread(peer.shake_hands, client)
            await asyncio.to_thread(peer.hello, client, offer.key)
            connection, came = port.take(PLACE), b""
            sent = peer.encrypted(writes)
            client.sendall(sent[:PART_BYTES])

            async def all_sent_and_received(size_bytes: int, filling: asyncio.Future[None]) -> None:
                await asyncio.sleep(0)  # it begins
                while not filling.done() and len(connection._room) == size_bytes:
                    await asyncio.sleep(0.01)
                if not filling.done():  # it has taken in what came, half a record included
                    client.sendall(sent[PART_BYTES:])
                await filling

            for size_bytes in rooms:
                room = memoryview(bytearray(size_bytes))
                filling = asyncio.ensure_future(connection.receive(room))
                await asyncio.wait_for(all_sent_and_received(size_bytes, filling), SOON_S)
                came += room
            assert came == DATA
            connection.close()

    play(scenario)


@pytest.mark.parametrize("cut", CUTS)
def test_a_worker_wakes_up_for_the_last_bytes_of_the_average(files: Files, cut: str) -> None:
    writes, rooms = CUTS[cut]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server.cert, files.server.key)
    context.num_tickets = 0
    took = threading.Event()

    def serve(theirs: socket.socket) -> None:
        peer = Peer(context, is_server=True)
        peer.shake_hands(theirs)
        sent = peer.encrypted(writes)
        theirs.sendall(sent[:PART_BYTES])
        took.wait(TIMEOUT_S)
        theirs.sendall(sent[PART_BYTES:])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        plain = socket.create_connection(listener.getsockname(), TIMEOUT_S)
        theirs, _ = listener.accept()
    with theirs:
        serving = threading.Thread(target=serve, args=(theirs,))
        serving.start()
        connection = DataSocket(client_context(files.authority.ca).wrap_socket(plain, server_hostname="127.0.0.1"))
        came = list[bytes]()

        def receive() -> None:
            for size_bytes in rooms:
                room = memoryview(bytearray(size_bytes))
                connection.receive(room, heard=took.set)
                came.append(bytes(room))

        receiving = threading.Thread(target=receive)
        receiving.start()
        receiving.join(SOON_S)
        is_late = receiving.is_alive()
        receiving.join(TIMEOUT_S)
        serving.join(TIMEOUT_S)
        connection.close()
    assert b"".join(came) == DATA
    assert not is_late


def test_a_connection_whose_keys_are_worn_out_is_replaced(
    start_server: StartServer, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_one = list[DataSocket](), DataSocket.open

    def noted(*arguments: object) -> DataSocket:
        opened.append(open_one(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(DataSocket, "open", noted)
    monkeypatch.setattr(encrypted_socket, "_MOST_BYTES", 5_000)  # two pushes of the model
    security = ServerSecurity(files.server.cert, files.server.key, files.authority.ca)
    with Pair(start_server(2, security=security).address, security=files.security(Role.WORKER)) as pair:
        until(lambda: pair.round() != [] and len(opened) >= 6, "each worker opens its third connection")
        pair.until_connected()
        assert pair.transports == {pb.TRANSPORT_DATA_CONNECTION}
        assert all(max(connection._encrypted.moved_bytes) < 10_000 for connection in opened if connection._encrypted)


def test_bytes_in_both_directions_at_once_arrive_unchanged(files: Files) -> None:
    data = [np.random.default_rng(seed).bytes(32 << 20) for seed in (0, 1)]
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.server.cert, files.server.key)
    server.num_tickets = 0
    with ThreadPoolExecutor(4) as threads, socket.create_server(("127.0.0.1", 0)) as listener:
        connecting = threads.submit(socket.create_connection, listener.getsockname())
        theirs, _ = listener.accept()
        serving = threads.submit(server.wrap_socket, theirs, server_side=True)
        client = client_context(files.authority.ca)
        ours = client.wrap_socket(connecting.result(), server_hostname="127.0.0.1")
        ends = [DataSocket(ours), DataSocket(serving.result())]
        rooms = [memoryview(bytearray(len(one))) for one in data]
        for moving in [threads.submit(end.send, [one]) for end, one in zip(ends, data, strict=True)] + [
            threads.submit(end.receive, room) for end, room in zip(ends, reversed(rooms), strict=True)
        ]:
            moving.result(60)
        for end in ends:
            end.close()
    assert [bytes(room) == one for room, one in zip(rooms, data, strict=True)] == [True, True]
