"""Data connections: workers open them in addition to their calls, for the bytes of later pushes.

An admission offers a connection; the worker opens it with the key in the offer. One push at a time uses it. A server
with TLS offers it under another name, to workers that encrypt it; the key is sent after the handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from modelaverage.runtime.data_sockets import (
    HALF_KEY_BYTES,
    NOTICES_IN_SILENCE,
    OVER_TLS,
    halves,
    new_key,
    prepare,
)
from modelaverage.runtime.encrypted_socket import EncryptedSocket
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.arriving import Strangers, handshake, read_all, write_all
from ps_server.transports.base import Opening
from ps_server.transports.data_connection import DataConnection, lost
from ps_server.transports.data_lane import DataLane, Place

__all__ = ["DataLane", "DataPort", "Place"]

# The greeting follows the connection at once, except when packets are lost.
_GREETING_TIMEOUT_S = 20.0
# For a TLS handshake. Behind a deep queue it may take longer: then the bytes go in messages, which cost a slow link no
# more.
_HANDSHAKE_TIMEOUT_S = 10.0
# The pause after a failed accept.
_PAUSE_S = 0.5
# Strangers that connect and stay silent delay new connections, nothing else.
_GREETINGS_AT_ONCE = 64


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
        self._tls_context: Callable[[], ssl.SSLContext] | None = None
        self._strangers = Strangers(asyncio.get_running_loop().time)
        self._arriving = set[socket.socket]()

    def listen(self, hosts: Sequence[str], port: int, tls_context: Callable[[], ssl.SSLContext] | None = None) -> int:
        """Listens on these hosts.

        Args:
            hosts: their names or addresses.
            port: the same for all; 0: any free one.
            tls_context: returns the context for a new connection; None: connections are in plain text.

        Returns:
            The port.

        Raises:
            OSError: it cannot listen.
        """
        self._tls_context = tls_context
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
        if not header.uses_data_connection and header.uses_transport != OVER_TLS:
            return None
        return DataLane(self.give_back, self.take(Place(header.worker_id, header.incarnation)), opening)

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Offers a connection to a worker that asks for one."""
        header = opening.header
        is_plain = self._tls_context is None
        is_asked = header.accepts_data_connection if is_plain else OVER_TLS in header.accepts_transports
        if not is_asked or opening.call.peer.startswith("unix"):
            return
        offered = self.offer_to(Place(header.worker_id, header.incarnation))
        if offered is not None and is_plain:
            admission.data_connection.CopyFrom(offered)
        elif offered is not None:
            admission.offers.add(transport=OVER_TLS, details=offered.SerializeToString())

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
                asyncio.get_running_loop().remove_writer(ended)
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
            connection, address = await asyncio.get_running_loop().sock_accept(listener)
            self._arriving.add(connection)
            self._begin(self._greet(connection, "{}:{}".format(*address[:2])))
        except BaseException:
            self._greetings.release()
            if connection is not None:
                self._arriving.discard(connection)
                connection.close()
            raise

    async def _greet(self, arrived: socket.socket, peer: str) -> None:
        connection, is_known = arrived, False
        try:
            connection.setblocking(False)
            prepare(connection, self._silence_timeout_s)
            encrypted: EncryptedSocket | None = None
            if self._tls_context is not None:
                if not self._offers:
                    raise ConnectionError("it was offered to nobody")  # a handshake costs more than this
                secure = self._tls_context().wrap_socket(arrived, server_side=True, do_handshake_on_connect=False)
                self._arriving.discard(arrived)
                self._arriving.add(secure)
                connection = secure
                await asyncio.wait_for(handshake(secure), _HANDSHAKE_TIMEOUT_S)
                encrypted = EncryptedSocket(secure)
            is_known = await asyncio.wait_for(self._take_key(connection, encrypted), _GREETING_TIMEOUT_S)
            if not is_known:
                raise ConnectionError("it has no valid key")
        except asyncio.TimeoutError:
            self._strangers.refused(peer, "nothing came in time")
        except (OSError, ValueError) as error:  # a stranger, or a worker that gave up
            self._strangers.refused(peer, error)
        finally:
            if not is_known:
                connection.close()
            self._arriving -= {arrived, connection}
            self._greetings.release()

    async def _take_key(self, connection: socket.socket, encrypted: EncryptedSocket | None) -> bool:
        stream = connection if encrypted is None else encrypted
        answer, place = self._offers.pop(await read_all(stream, HALF_KEY_BYTES), (b"", None))
        if place is None:
            return False
        # Before the answer: a client that has it may push at once.
        self._drop(place.worker_id)
        notice_s = self._silence_timeout_s / NOTICES_IN_SILENCE
        self._put(place, DataConnection(connection, place.worker_id, notice_s, encrypted))
        await write_all(stream, answer)
        return True
