"""The bytes of a push on a socket of their own, beside its call. The .proto says how."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ma_client.transports.data_settings import DataSettings
from ma_client.transports.staging import FragmentSource, Staging
from ma_client.transports.timing import TIMING, Timing
from modelaverage.logs import event
from modelaverage.runtime.data_sockets import (
    NOTICES_IN_SILENCE,
    NUMBER,
    Pace,
    halves,
    prepare,
    use_short_queues,
    want,
)
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["DataSocket", "Transfer"]

_log = logging.getLogger("ma_client")
_MOST_PARTS = 64
_LOOK_S = 0.1
# A reader is woken up for whole fragments; on a slow link it has to look meanwhile whether anything comes.
_LOOKS_IN_SILENCE = 8


class DataSocket:
    """A data connection that the server has answered. Each direction is for one thread at a time; `break_off` is for
    any.

    Args:
        connection: the socket; this object's from now on.
        silence_timeout_s: it is lost when it is silent for longer, though something should move.
        peer: what it is connected to, for the log.
    """

    def __init__(self, connection: socket.socket, silence_timeout_s: float = SILENCE_TIMEOUT_S, peer: str = "") -> None:
        self._socket = connection
        self.silence_timeout_s = silence_timeout_s
        self.peer = peer
        self.moved_at_s = time.monotonic()
        """When bytes last went or came, on the monotonic clock."""
        self._pace = Pace(connection)
        self._is_over = threading.Event()
        connection.settimeout(None)

    @classmethod
    def open(cls, host: str, offer: pb.DataConnection, settings: DataSettings) -> DataSocket:
        """Connects. Raises OSError: nobody is there, or somebody else; ValueError, OverflowError: that is no offer."""
        hello, answer = halves(offer.key)
        connection = socket.create_connection((host, offer.port), settings.connect_timeout_s)
        end_s = time.monotonic() + settings.connect_timeout_s
        try:
            prepare(connection, settings.silence_timeout_s)
            connection.sendall(hello)
            came = b""
            while len(came) < len(answer) and (more := connection.recv(len(answer) - len(came))):
                came += more
                connection.settimeout(max(0.001, end_s - time.monotonic()))
            if came != answer:
                raise OSError("what listens there does not know the key")
        except BaseException:
            connection.close()
            raise
        return cls(connection, settings.silence_timeout_s, f"{host}:{offer.port}")

    @property
    def is_open(self) -> bool:
        """Whether it seems to be usable: between two pushes nothing comes, but an end."""
        return not self._poll(0)

    def begin(self) -> None:
        """A push begins."""
        self.moved_at_s = time.monotonic()
        use_short_queues(self._socket)
        self._pace.begin()

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """All of the parts, one behind the other. Raises OSError."""
        left = [memoryview(part) for part in parts if len(part)]
        if len(left) > _MOST_PARTS:
            left = [memoryview(b"".join(left))]
        while left:
            sent = self._socket.sendmsg(_first(left, self._room()))
            self.moved_at_s = time.monotonic()
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _room(self) -> int:
        """Waits until something may go; how many bytes. Raises OSError."""
        while True:
            before_bytes = self._pace.waiting_bytes
            room_bytes = self._pace.room()
            if self._pace.waiting_bytes < before_bytes:
                self.moved_at_s = time.monotonic()
            if room_bytes:
                return room_bytes
            if self._is_over.wait(self._pace.pause_s):
                raise OSError("it was broken off")

    def receive(
        self, room: memoryview, heard: Callable[[], None] = lambda: None, unheard: Callable[[], None] = lambda: None
    ) -> None:
        """Fills the room. ``heard`` is called when something of it has come, ``unheard`` now and then while nothing
        comes. Raises OSError."""
        while room:
            # A blocking recv would do, but for Linux: once it has taken some, the rest wakes it up only if that alone
            # is as much as is wanted.
            want(self._socket, len(room))
            self._poll(self.silence_timeout_s / _LOOKS_IN_SILENCE)
            try:
                count = self._socket.recv_into(room, flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                unheard()
                continue
            if count == 0:
                raise OSError("the server has closed it")
            self.moved_at_s = time.monotonic()
            heard()
            room = room[count:]

    def look(self) -> None:
        """Notes whether bytes that the kernel has taken are on their way."""
        if self._pace.moves():
            self.moved_at_s = time.monotonic()

    def break_off(self) -> None:
        """Ends whoever sends or receives."""
        self._is_over.set()
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it. Nobody sends or receives."""
        self._socket.close()

    def _poll(self, timeout_s: float) -> bool:
        """Waits for something to read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def _first(parts: Sequence[memoryview], size_bytes: int) -> list[memoryview]:
    """So much of them from the first on, or all if they have less."""
    found = []
    for part in parts:
        if size_bytes <= 0:
            break
        found.append(part[:size_bytes])
        size_bytes -= len(part)
    return found


class Transfer:
    """The bytes of one push, up and down at the same time.

    Args:
        connection: where; this object's until `end`.
        number: of the push.
        fragments: the bytes of every fragment, as parts.
        staging: where the center arrives.
        timing: how long to wait for what.

    Attributes:
        connection: the same.
        give_up: ends the push's call; to be set once there is one.
        gave_up: whether that was done.
        problem: why bytes did not go or come.
        is_whole: whether everything has gone and come.
    """

    def __init__(
        self,
        connection: DataSocket,
        number: int,
        fragments: FragmentSource,
        staging: Staging,
        timing: Timing = TIMING,
    ) -> None:
        self.connection = connection
        self._last_word_s = timing.last_word_s
        self._over = threading.Event()
        self.give_up: Callable[[], object] = lambda: None
        self.gave_up = self.is_whole = False
        self.problem: Exception | None = None
        self._due_since_s: float | None = None  # since when bytes have to come; those that go up have to from the start
        self._notice_s = self._first_notice_s = connection.silence_timeout_s / NOTICES_IN_SILENCE
        room = staging.room()

        def send() -> None:
            connection.begin()
            connection.send([NUMBER.pack(number)])
            for index in range(staging.manifest.fragment_count):
                connection.send(fragments(index))

        def receive() -> None:
            connection.receive(room, staging.begin_to_fill, self._notice)

        self._threads = [
            threading.Thread(target=self._run, args=(work,), name="data-transfer", daemon=True)
            for work in (send, receive)
        ]

    def start(self) -> None:
        """Begins. Whatever it raises, `end` has to be called. Raises RuntimeError: there are no threads left."""
        for thread in self._threads:
            thread.start()

    def wait(self, goes_on: Callable[[], bool]) -> bool:
        """Waits for the rest of the bytes as long as they move and ``goes_on``; `is_whole`."""
        self._due_since_s, limit_s = time.monotonic(), self.connection.silence_timeout_s
        for thread in self._threads:
            while thread.is_alive() and self.problem is None and goes_on():
                self.connection.look()
                if self._silent_s > limit_s:
                    self.problem = TimeoutError(f"nothing came for {limit_s:g} s")
                thread.join(_LOOK_S)
        self.is_whole = self.problem is None and not any(thread.is_alive() for thread in self._threads)
        return self.is_whole

    def end(self) -> None:
        """The push has ended. Unless it `is_whole`, nobody knows what is still in the connection: it is closed."""
        self._over.set()
        if not self.is_whole:
            self.connection.break_off()
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()
        if not self.is_whole:
            self.connection.close()

    @property
    def _silent_s(self) -> float:
        """For how long nothing has moved that should have; 0 if nothing has to."""
        if self._due_since_s is None and not self._threads[0].is_alive():
            return 0.0
        return time.monotonic() - max(self._due_since_s or 0.0, self.connection.moved_at_s)

    def _notice(self) -> None:
        self.connection.look()
        silent_s = self._silent_s
        if silent_s < self._notice_s:
            return
        peer, self._notice_s = self.connection.peer, 2 * self._notice_s + self._first_notice_s
        what = event("data_connection_waits", worker=None, peer=peer, waited_s=silent_s)
        _log.warning("nothing has moved on the data connection to %s for %.0f s", peer, silent_s, extra=what)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.problem = self.problem or error
            if not self._over.wait(self._last_word_s):
                self.gave_up = True
                self.give_up()
