"""Data connections: workers open them in addition to their calls, for the bytes of later pushes.

An admission offers a connection; the worker opens it with the key in the offer. One push at a time uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from modelaverage.runtime.data_sockets import HALF_KEY_BYTES, NOTICES_IN_SILENCE, NUMBER, halves, new_key, prepare
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.base import Opening, Run, Source
from ps_server.transports.data_connection import DataConnection, lost

__all__ = ["DataLane", "DataPort", "Place"]

# The greeting follows the connection at once, except when packets are lost.
_GREETING_TIMEOUT_S = 20.0
# The pause after a failed accept.
_PAUSE_S = 0.5
# Strangers that connect and stay silent delay new connections, nothing else.
_GREETINGS_AT_ONCE = 64


@dataclass(frozen=True)
class Place:
    """The owner of a connection: a worker's process."""

    worker_id: str
    incarnation: bytes


class DataLane:
    """A push whose fragments all arrive on its worker's data connection; the average is sent there, too.

    Args:
        port: takes the connection back after the push.
        connection: the connection of the worker's process; reserved for this push.
        opening: the push.
    """

    kind = pb.TRANSPORT_DATA_CONNECTION
    is_shared = False

    def __init__(self, port: DataPort, connection: DataConnection, opening: Opening) -> None:
        self._port = port
        self._connection: DataConnection | None = connection
        self._place = Place(opening.header.worker_id, opening.header.incarnation)
        self._push_id = opening.header.push_id
        self._call = opening.call
        self._manifest = opening.manifest
        self._codec = opening.codec
        self._room: memoryview | None = None  # None: no byte has been read
        self._received = 0

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """Adds nothing."""

    async def receive(self) -> Run | None:
        """The next fragment. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        if self._room is None:
            await self._begin()
        assert self._room is not None
        index = self._received
        if index == self._manifest.fragment_count:
            return None
        data = self._room[: self._codec.size_bytes(self._manifest, index)]
        await self._read(data)
        self._received += 1
        return Run(index, data)

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """One fragment, or a run that ends at a multiple of the maximum run length."""
        longest = self._manifest.longest_run
        return min(finished, (first // longest + 1) * longest) if runs else first + 1

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Sends the bytes on the data connection. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        assert self._connection is not None
        for data in average.data(first, end):
            await self._call.write_aside(self._connection, self._connection.send(data))
        return b""

    def answered(self, is_committed: bool) -> None:
        """Returns the connection for the next push if no bytes are left in it."""
        if is_committed and self._received == self._manifest.fragment_count and self._connection is not None:
            connection, self._connection = self._connection, None
            self._port.give_back(self._place, connection)

    def close(self) -> None:
        """Closes the connection unless it was given back, because unknown bytes may be left in it."""
        if self._connection is not None:
            self._connection.close()

    async def _begin(self) -> None:
        assert self._connection is not None
        self._connection.begin()
        self._room = memoryview(bytearray(max(self._codec.max_size_bytes(self._manifest), NUMBER.size)))
        number = self._room[: NUMBER.size]
        await self._read(number)
        if NUMBER.unpack(number) != (self._push_id,):
            raise lost("its bytes are another push's")

    async def _read(self, room: memoryview) -> None:
        assert self._connection is not None
        await self._call.read_aside(self._connection, self._connection.receive(room))


class DataPort:
    """Accepts data connections; offers none until `listen`. Created and used on one running event loop.

    Args:
        max_connections: how many are kept; above that, the oldest are closed.
        silence_timeout_s: a connection whose bytes are not acknowledged for this long is lost.
    """

    def __init__(self, max_connections: int, silence_timeout_s: float = SILENCE_TIMEOUT_S) -> None:
        self._max_connections = max_connections
        self._silence_timeout_s = silence_timeout_s
        self._listeners: list[socket.socket] = []
        self._offers: dict[bytes, tuple[bytes, Place]] = {}  # first half of the key -> second half, owner
        self._offered: dict[str, bytes] = {}  # worker id -> first half of the key of its last offer
        self._connections: dict[str, tuple[Place, DataConnection]] = {}  # worker id -> owner, connection
        self._greetings = asyncio.Semaphore(_GREETINGS_AT_ONCE)
        self._tasks = set[asyncio.Task[None]]()
        self._arriving = set[socket.socket]()

    def listen(self, hosts: Sequence[str], port: int) -> int:
        """Listens on these hosts, on the same port of each; 0: any free one. Returns the port.

        Raises:
            OSError: it cannot listen.
        """
        try:
            for host in hosts:
                family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                both = host == "::" and socket.has_dualstack_ipv6()
                listener = socket.create_server(address[:2], family=family, backlog=1024, dualstack_ipv6=both)
                self._listeners.append(listener)
                listener.setblocking(False)
                port = listener.getsockname()[1]
        except OSError:
            self.close()
            raise
        for listener in self._listeners:
            self._begin(self._accept(listener))
        return port

    def open(self, opening: Opening) -> DataLane | None:
        """The lane of a push that uses its worker's connection. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        header = opening.header
        if not header.uses_data_connection:
            return None
        return DataLane(self, self.take(Place(header.worker_id, header.incarnation)), opening)

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Offers a connection to a worker that asks for one."""
        header = opening.header
        if header.accepts_data_connection and not opening.call.peer.startswith("unix"):
            offered = self.offer_to(Place(header.worker_id, header.incarnation))
            if offered is not None:
                admission.data_connection.CopyFrom(offered)

    def offer_to(self, place: Place) -> pb.DataConnection | None:
        """The offer for a process that asks for a connection; None: there is none. Voids its earlier offers."""
        if not self._listeners:
            return None
        worker_id = place.worker_id
        self._drop(worker_id)  # its own lost connection, or an earlier process's
        key = new_key()
        hello, answer = halves(key)
        self._offers[hello] = answer, place
        self._offered[worker_id] = hello
        if len(self._offered) > self._max_connections:  # clients choose names, so memory must be bounded
            self._drop(next(iter(self._offered)))
        return pb.DataConnection(port=self._listeners[0].getsockname()[1], key=key)

    def take(self, place: Place) -> DataConnection:
        """Takes the connection of a process for a push; `give_back` returns it.

        Raises:
            RetryPushError: DATA_CONNECTION_LOST: there is no connection.
        """
        owner, connection = self._connections.get(place.worker_id, (None, None))
        if connection is None or owner != place:
            raise lost("this server has none of this process")
        del self._connections[place.worker_id]
        return connection

    def give_back(self, place: Place, connection: DataConnection) -> None:
        """Keeps a connection for its process's next push, unless a newer one exists."""
        if place.worker_id in self._connections:
            connection.close()
        else:
            self._put(place, connection)

    def keep_only(self, worker_ids: frozenset[str]) -> None:
        """Keeps connections: each costs one descriptor, and a new one costs a round trip."""

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """Closes the connection of a process that leaves, if it has one."""
        if self._connections.get(worker_id, (None,))[0] == Place(worker_id, incarnation):
            self._drop(worker_id)

    def _put(self, place: Place, connection: DataConnection) -> None:
        self._connections[place.worker_id] = place, connection
        if len(self._connections) > self._max_connections:  # clients choose names, so sockets must be bounded
            self._drop(next(iter(self._connections)))

    def _drop(self, worker_id: str) -> None:
        self._offers.pop(self._offered.pop(worker_id, b""), None)
        _, connection = self._connections.pop(worker_id, (None, None))
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Ends all."""
        for task in self._tasks:
            task.cancel()
        for ended in (*self._listeners, *self._arriving):
            with contextlib.suppress(ValueError):  # already closed
                asyncio.get_running_loop().remove_reader(ended)
            ended.close()
        self._listeners.clear()
        for worker_id in list(self._connections):
            self._drop(worker_id)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                await self._accept_one(listener)
            except Exception:  # no descriptors, no memory, or the client has gone: keep accepting
                await asyncio.sleep(_PAUSE_S)

    async def _accept_one(self, listener: socket.socket) -> None:
        await self._greetings.acquire()
        connection: socket.socket | None = None
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._arriving.add(connection)
            self._begin(self._greet(connection))
        except BaseException:
            self._greetings.release()
            if connection is not None:
                self._arriving.discard(connection)
                connection.close()
            raise

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        async def greeting() -> bool:
            hello = b""
            while len(hello) < HALF_KEY_BYTES:
                more = await loop.sock_recv(connection, HALF_KEY_BYTES - len(hello))
                if not more:
                    return False
                hello += more
            answer, place = self._offers.pop(hello, (b"", None))
            if place is None:
                return False
            # Before the answer: a client that has it may push at once.
            self._drop(place.worker_id)
            notice_s = self._silence_timeout_s / NOTICES_IN_SILENCE
            self._put(place, DataConnection(connection, place.worker_id, notice_s))
            await loop.sock_sendall(connection, answer)
            return True

        is_known = False
        try:
            connection.setblocking(False)
            prepare(connection, self._silence_timeout_s)
            is_known = await asyncio.wait_for(greeting(), _GREETING_TIMEOUT_S)
        except (OSError, ValueError, asyncio.TimeoutError):
            pass  # a stranger, or a worker that gave up
        finally:
            if not is_known:
                connection.close()
            self._arriving.discard(connection)
            self._greetings.release()
