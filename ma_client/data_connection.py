"""The bytes of a push on a socket of their own, beside its call. The .proto says how; nothing here knows gRPC."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable

from ma_client.staging import Staging
from modelaverage.data_connection import NUMBER, halves, prepare, use_short_queues, want
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["DataConnection", "DataLink", "Transfer", "host_of"]

_CONNECT_TIMEOUT_S = 5.0
# What stands between may let gRPC's port pass and no other; so it is tried again, but not with every push.
_TRY_AGAIN_AFTER_S = 60.0
# A smaller model is one message, or a few.
_WORTH_BYTES = 1 << 20
# When the connection breaks, the server's own word on the push comes so soon after it.
_LAST_WORD_S = 1.0
_MOST_PARTS = 64
_LOOK_S = 0.1


def host_of(address: str) -> str | None:
    """The host in an address as gRPC takes it; None: there is none that a socket could connect to."""
    found = re.fullmatch(r"(?:dns:///|ipv4:|ipv6:)?(\[[^\]]+\]|[^:/]+):\d+", address)
    return None if found is None else found[1].strip("[]")


class DataConnection:
    """A connection that the server has answered. Either direction is for one thread at a time, `break_off` for any."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(None)

    @classmethod
    def open(cls, host: str, offer: pb.DataConnection) -> DataConnection:
        """Connects. Raises OSError: nobody is there, or somebody else; ValueError, OverflowError: that is no offer."""
        hello, answer = halves(offer.key)
        connection = socket.create_connection((host, offer.port), _CONNECT_TIMEOUT_S)
        try:
            prepare(connection)
            connection.sendall(hello)
            came = b""
            while len(came) < len(answer) and (more := connection.recv(len(answer) - len(came))):
                came += more
            if came != answer:
                raise OSError("what listens there does not know the key")
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @property
    def is_open(self) -> bool:
        """Whether it seems to be usable: between two pushes nothing comes, but an end."""
        return not self._poll(0)

    def begin(self) -> None:
        """A push begins."""
        use_short_queues(self._socket)

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """All of the parts, one behind the other. Raises OSError."""
        left = [memoryview(part) for part in parts if len(part)]
        if len(left) > _MOST_PARTS:
            left = [memoryview(b"".join(left))]
        while left:
            sent = self._socket.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def receive(self, room: memoryview, heard: Callable[[], None] = lambda: None) -> None:
        """Fills the room; says so when something of it has come. Raises OSError."""
        while room:
            # A blocking recv would do, but for Linux: once it has taken some, the rest wakes it up only if that alone
            # is as much as is wanted.
            want(self._socket, len(room))
            self._poll()
            count = self._socket.recv_into(room, flags=socket.MSG_DONTWAIT)
            if count == 0:
                raise OSError("the server has closed it")
            heard()
            room = room[count:]

    def break_off(self) -> None:
        """Ends whoever sends or receives."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it. Nobody sends or receives."""
        self._socket.close()

    def _poll(self, timeout_ms: int | None = None) -> bool:
        """Waits for something to read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_ms))


class DataLink:
    """The way to one server's data connections: opened beside a push, used by later ones.

    Args:
        address: of the server, as gRPC takes it.
    """

    def __init__(self, address: str) -> None:
        self._host = host_of(address)
        self._lock = threading.Lock()
        self._connection: DataConnection | None = None
        self._opening = self._closed = False
        self._not_before_s = 0.0

    def wants(self, size_bytes: int) -> bool:
        """Whether to ask the server for a connection, for models of this size."""
        with self._lock:
            needed = self._connection is None and not self._opening and not self._closed
            return (
                self._host is not None
                and needed
                and size_bytes >= _WORTH_BYTES
                and time.monotonic() >= self._not_before_s
            )

    def open(self, offer: pb.DataConnection) -> None:
        """Connects, without keeping anybody waiting."""
        with self._lock:
            self._opening = True
        threading.Thread(target=self._open, args=(offer,), name="data-connection", daemon=True).start()

    def take(self) -> DataConnection | None:
        """The connection, for a push, if there is one; `put` gives it back."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and not connection.is_open:
            connection.close()
            return None
        return connection

    def put(self, connection: DataConnection) -> None:
        """A connection is ready for the next push."""
        with self._lock:
            if not self._closed:
                self._connection = connection
                return
        connection.close()

    def close(self) -> None:
        """There will be no other push."""
        with self._lock:
            self._closed = True
        connection = self.take()
        if connection is not None:
            connection.close()

    def _open(self, offer: pb.DataConnection) -> None:
        assert self._host is not None
        try:
            self.put(DataConnection.open(self._host, offer))
        except (OSError, ValueError, OverflowError):  # not there, or no host, or no port
            self._not_before_s = time.monotonic() + _TRY_AGAIN_AFTER_S
        finally:
            with self._lock:
                self._opening = False


class Transfer:
    """The bytes of one push, up and down at the same time.

    Args:
        connection: where; this object's until `end`.
        number: of the push.
        fragments: the bytes of every fragment, as parts.
        staging: where the center arrives.

    Attributes:
        give_up: ends the push's call; to be set once there is one.
        gave_up: whether that was done.
        problem: why bytes did not go or come.
        is_whole: whether everything has gone and come.
    """

    def __init__(
        self,
        connection: DataConnection,
        number: int,
        fragments: Callable[[int], Iterable[memoryview]],
        staging: Staging,
    ) -> None:
        self._connection = connection
        self._staging = staging
        self._over = threading.Event()
        self.give_up: Callable[[], object] = lambda: None
        self.gave_up = self.is_whole = False
        self.problem: Exception | None = None
        room = staging.room()

        def send() -> None:
            connection.begin()
            connection.send([NUMBER.pack(number)])
            for index in range(staging.manifest.fragment_count):
                connection.send(fragments(index))

        def receive() -> None:
            connection.receive(room, staging.begin_to_fill)

        self._threads = [
            threading.Thread(target=self._run, args=(work,), name="data-transfer", daemon=True)
            for work in (send, receive)
        ]

    def start(self) -> None:
        """Begins. Whatever it raises, `end` has to be called."""
        for thread in self._threads:
            thread.start()

    def wait(self, goes_on: Callable[[], bool]) -> bool:
        """Waits for the rest of the bytes for as long as ``goes_on``; `is_whole`."""
        for thread in self._threads:
            while thread.is_alive() and goes_on():
                thread.join(_LOOK_S)
        self.is_whole = self.problem is None and not any(thread.is_alive() for thread in self._threads)
        if self.is_whole:
            self._staging.filled()
        return self.is_whole

    def end(self) -> None:
        """The push has ended. Unless it `is_whole`, nobody knows what is still in the connection: it is closed."""
        self._over.set()
        if not self.is_whole:
            self._connection.break_off()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if not self.is_whole:
            self._connection.close()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.problem = error
            if not self._over.wait(_LAST_WORD_S):
                self.gave_up = True
                self.give_up()
