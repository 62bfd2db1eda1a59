"""Data connections: sockets beside gRPC for the bytes of pushes. I/O only; no rules of the round.

Offered to a worker in an admission, opened by it with the key that it was given, used by later pushes one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.runtime.data_sockets import (
    HALF_KEY_BYTES,
    NOTICES_IN_SILENCE,
    Pace,
    halves,
    new_key,
    prepare,
    use_short_queues,
    want,
)
from modelaverage.runtime.logs import event
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["DataConnection", "DataPort", "lost"]

_log = logging.getLogger("ps_server")
# The greeting follows the connection at once, but for what is lost on the way.
_GREETING_TIMEOUT_S = 20.0
# After a failure to accept.
_PAUSE_S = 0.5
# Strangers that connect and say nothing hold up new connections, not more.
_GREETINGS_AT_ONCE = 64


class DataConnection:
    """A connection to one worker's process.

    Args:
        connection: a socket that does not block; this object's from now on.
        worker_id: of the worker, for the log.
        notice_s: when nothing moves for so long, it is said; then again after 3 and 7 times as long, and so on.
    """

    def __init__(self, connection: socket.socket, worker_id: str, notice_s: float) -> None:
        self._socket = connection
        self._worker_id, self._notice_s = worker_id, notice_s
        self._peer = "{}:{}".format(*connection.getpeername()[:2])
        self._loop = asyncio.get_running_loop()
        self._room = memoryview(b"")  # what is still to be filled
        self._filled: asyncio.Future[None] | None = None
        self._is_watched = False
        self._pace = Pace(connection)
        self.heard_at_s = self._loop.time()
        """When bytes last came, on the loop's clock."""
        self.taken_at_s = self.heard_at_s
        """When bytes last went."""

    def begin(self) -> None:
        """A push begins."""
        with contextlib.suppress(OSError):  # the next read or write says it
            use_short_queues(self._socket)
            self._pace.begin()

    async def receive(self, room: memoryview) -> None:
        """Fills the room. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        self._room, self._filled = room, self._loop.create_future()
        try:
            want(self._socket, len(room))
            if not self._is_watched:
                self._loop.add_reader(self._socket, self._read)
                self._is_watched = True
            with self._noticing("sends nothing", lambda: self.heard_at_s):
                await self._filled
        except OSError as error:
            raise lost(error) from None
        finally:
            self._filled = None

    async def send(self, data: memoryview) -> None:
        """All of the bytes, once the kernel has them. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        try:
            with self._noticing("takes nothing of what is sent", lambda: self.taken_at_s):
                while data:
                    size_bytes = await self._sendable()
                    await self._loop.sock_sendall(self._socket, data[:size_bytes])
                    self.taken_at_s, data = self._loop.time(), data[size_bytes:]
        except OSError as error:
            raise lost(error) from None

    async def _sendable(self) -> int:
        """Waits until something may go; how many bytes. Raises OSError."""
        while True:
            before_bytes = self._pace.waiting_bytes
            room_bytes = self._pace.room()
            if self._pace.waiting_bytes < before_bytes:
                self.taken_at_s = self._loop.time()
            if room_bytes:
                return room_bytes
            await asyncio.sleep(self._pace.pause_s)

    def close(self) -> None:
        """Ends it."""
        self._watch_no_longer()
        self._socket.close()

    @contextmanager
    def _noticing(self, doing: str, moved_at_s: Callable[[], float]) -> Iterator[None]:
        """If nothing moves for long, it is said."""
        began_at_s, notice_s = self._loop.time(), self._notice_s
        self._pace.moves()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer, notice_s
            if self._pace.moves():
                self.taken_at_s = self._loop.time()
            if self._is_watched:
                self._read()  # on a slow link some may have come, and not enough to be woken up for
            waited_s = self._loop.time() - max(began_at_s, moved_at_s())
            if waited_s >= notice_s:
                notice_s = 2 * notice_s + self._notice_s
                worker, peer = self._worker_id, self._peer
                what = event("data_connection_waits", worker=worker, peer=peer, waited_s=waited_s)
                _log.warning("%r %s on its data connection for %.0f s", worker, doing, waited_s, extra=what)
            timer = self._loop.call_later(notice_s - waited_s, look)

        timer = self._loop.call_later(self._notice_s, look)
        try:
            yield
        finally:
            timer.cancel()

    def _read(self) -> None:
        """There is something to read. The socket stays watched from one fragment to the next, which saves calls."""
        filled = self._filled
        if filled is None or filled.done():
            self._watch_no_longer()
            return
        try:
            count = self._socket.recv_into(self._room)
            if count == 0:
                raise ConnectionResetError("the worker has closed it")
            self._room = self._room[count:]
            if self._room:
                want(self._socket, len(self._room))
        except BlockingIOError:
            return
        except OSError as error:
            self._watch_no_longer()
            filled.set_exception(error)
            return
        self.heard_at_s = self._loop.time()
        if not self._room:
            filled.set_result(None)

    def _watch_no_longer(self) -> None:
        if self._is_watched:
            self._loop.remove_reader(self._socket)
            self._is_watched = False


@dataclass(frozen=True)
class _Place:
    """Whose connection it is."""

    worker_id: str
    incarnation: bytes


class DataPort:
    """Where workers open data connections; offers none until `listen`. Made and used on one running event loop.

    Args:
        max_connections: how many are kept; of more, the oldest are closed.
        silence_timeout_s: one on which bytes get no acknowledgement for so long is lost.
    """

    def __init__(self, max_connections: int, silence_timeout_s: float = SILENCE_TIMEOUT_S) -> None:
        self._max_connections = max_connections
        self._silence_timeout_s = silence_timeout_s
        self._listeners: list[socket.socket] = []
        self._offers: dict[bytes, tuple[bytes, _Place]] = {}  # by the first half of the key: the second half
        self._offered: dict[str, bytes] = {}  # by worker id: the first half of the key of its last offer
        self._connections: dict[str, tuple[_Place, DataConnection]] = {}  # by worker id
        self._greetings = asyncio.Semaphore(_GREETINGS_AT_ONCE)
        self._tasks = set[asyncio.Task[None]]()
        self._arriving = set[socket.socket]()

    def listen(self, hosts: Sequence[str], port: int) -> int:
        """Listens on these hosts, on the same port of each; 0: any free one. Returns the port.

        Raises:
            OSError: it cannot.
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

    def offer(self, worker_id: str, incarnation: bytes) -> pb.DataConnection | None:
        """What to tell a worker that would like a connection; None: there is none. Earlier offers are void."""
        if not self._listeners:
            return None
        self._drop(worker_id)  # its own, which it has lost, or an earlier process's
        key = new_key()
        hello, answer = halves(key)
        self._offers[hello] = answer, _Place(worker_id, incarnation)
        self._offered[worker_id] = hello
        if len(self._offered) > self._max_connections:  # names come from outside, memory must not
            self._drop(next(iter(self._offered)))
        return pb.DataConnection(port=self._listeners[0].getsockname()[1], key=key)

    def take(self, worker_id: str, incarnation: bytes) -> DataConnection:
        """The connection of this process, for a push; `give_back` is for afterwards.

        Raises:
            RetryPushError: DATA_CONNECTION_LOST: there is none.
        """
        place, connection = self._connections.get(worker_id, (None, None))
        if connection is None or place != _Place(worker_id, incarnation):
            raise lost("this server has none of this process")
        del self._connections[worker_id]
        return connection

    def give_back(self, worker_id: str, incarnation: bytes, connection: DataConnection) -> None:
        """A connection is ready for this process's next push, unless there is another one by now."""
        if worker_id in self._connections:
            connection.close()
        else:
            self._put(_Place(worker_id, incarnation), connection)

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """Closes the connection of a process that goes, if it has one."""
        if self._connections.get(worker_id, (None,))[0] == _Place(worker_id, incarnation):
            self._drop(worker_id)

    def _put(self, place: _Place, connection: DataConnection) -> None:
        self._connections[place.worker_id] = place, connection
        if len(self._connections) > self._max_connections:  # names come from outside, sockets must not
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
            with contextlib.suppress(ValueError):  # it is closed
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
            except Exception:  # no descriptors, no memory, or the client has gone: others may come
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
            # Before the answer: whoever has that may push at once.
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
            pass  # a stranger, or somebody who gave up
        finally:
            if not is_known:
                connection.close()
            self._arriving.discard(connection)
            self._greetings.release()


def lost(why: object) -> ModelAverageError:
    """DATA_CONNECTION_LOST, for this reason."""
    return refusal(Reason.DATA_CONNECTION_LOST, f"the data connection is lost ({why}); push again without it")
