"""The bytes of a push on a separate socket, outside its call. The .proto defines the format."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ma_client.transports.base import OutgoingPush
from ma_client.transports.data_settings import DataSettings
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
# A reader wakes up for whole fragments. On a slow link it must check in between whether bytes arrive.
_LOOKS_IN_SILENCE = 8


class DataSocket:
    """A data connection that the server has answered. One thread may send and one receive; `break_off` may be called
    from any thread.

    Args:
        connection: the socket; this object owns and closes it.
        silence_timeout_s: a connection that should move bytes and is silent for longer is lost.
        peer: the address of the server, for the log.
    """

    def __init__(self, connection: socket.socket, silence_timeout_s: float = SILENCE_TIMEOUT_S, peer: str = "") -> None:
        self._socket = connection
        self.silence_timeout_s = silence_timeout_s
        self.peer = peer
        self.moved_at_s = time.monotonic()
        """When bytes were last sent or received, on the monotonic clock."""
        self._pace = Pace(connection)
        self._is_over = threading.Event()
        connection.settimeout(None)

    @classmethod
    def open(cls, host: str, offer: pb.DataConnection, settings: DataSettings) -> DataSocket:
        """Connects. Raises OSError: no server, or another one, answers; ValueError, OverflowError: a malformed
        offer."""
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
        """Whether the connection seems usable: between two pushes, only its end makes it readable."""
        return not self._poll(0)

    def begin(self) -> None:
        """A push begins."""
        self.moved_at_s = time.monotonic()
        use_short_queues(self._socket)
        self._pace.begin()

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Sends all parts in order. Raises OSError."""
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
        """Waits until the socket is writable; returns how many bytes to send. Raises OSError."""
        while True:
            before_bytes = self._pace.waiting_bytes
            room_bytes = self._pace.room()
            if self._pace.waiting_bytes < before_bytes:
                self.moved_at_s = time.monotonic()
            if room_bytes:
                return room_bytes
            if self._is_over.wait(self._pace.pause_s):
                raise OSError("it was cancelled")

    def receive(
        self, room: memoryview, heard: Callable[[], None] = lambda: None, unheard: Callable[[], None] = lambda: None
    ) -> None:
        """Fills the room. Calls ``heard`` when bytes have arrived, and ``unheard`` now and then while none arrive.
        Raises OSError."""
        while room:
            # A blocking recv would do, except on Linux: after a partial read, it wakes up only when the rest alone
            # reaches the wanted size.
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
        """Checks whether the kernel is still sending bytes."""
        if self._pace.moves():
            self.moved_at_s = time.monotonic()

    def break_off(self) -> None:
        """Ends a send or receive in progress."""
        self._is_over.set()
        with contextlib.suppress(OSError):  # the other end has already closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket. No send or receive may be in progress."""
        self._socket.close()

    def _poll(self, timeout_s: float) -> bool:
        """Waits until bytes can be read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def _first(parts: Sequence[memoryview], size_bytes: int) -> list[memoryview]:
    """The first ``size_bytes`` of the parts, or all of them if they have fewer."""
    found = []
    for part in parts:
        if size_bytes <= 0:
            break
        found.append(part[:size_bytes])
        size_bytes -= len(part)
    return found


class Transfer:
    """The bytes of one push, sent and received at the same time.

    Args:
        connection: the connection; this object owns it until `end`.
        opening: the push.
        timing: timeouts.

    Attributes:
        connection: the connection.
        give_up: ends the push's call; set it once there is a call.
        gave_up: whether `give_up` was called.
        problem: why bytes did not move.
        is_whole: whether all bytes were sent and received.
    """

    def __init__(
        self,
        connection: DataSocket,
        opening: OutgoingPush,
        timing: Timing = TIMING,
    ) -> None:
        self.connection = connection
        self._last_word_s = timing.last_word_s
        self._over = threading.Event()
        self.give_up: Callable[[], object] = lambda: None
        self.gave_up = self.is_whole = False
        self.problem: Exception | None = None
        self._due_since_s: float | None = None  # since when bytes must arrive; sent bytes must move from the start
        self._notice_s = self._first_notice_s = connection.silence_timeout_s / NOTICES_IN_SILENCE
        self._opening = opening
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name="data-transfer", daemon=True)
            for work in (self._send, self._receive)
        ]

    def start(self) -> None:
        """Starts the threads. Call `end` even if it raises. Raises RuntimeError: no threads are left."""
        for thread in self._threads:
            thread.start()

    def wait(self, goes_on: Callable[[], bool]) -> bool:
        """Waits for the rest of the bytes as long as they move and ``goes_on``. Returns `is_whole`."""
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
        """Ends the transfer. Unless it `is_whole`, closes the connection, because unknown bytes may be left in it."""
        self._over.set()
        if not self.is_whole:
            self.connection.break_off()
        for thread in self._threads:
            if thread.ident is not None:  # the thread was started
                thread.join()
        if not self.is_whole:
            self.connection.close()

    @property
    def _silent_s(self) -> float:
        """For how long no bytes have moved that should; 0 if none are due."""
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

    def _send(self) -> None:
        self.connection.begin()
        self.connection.send([NUMBER.pack(self._opening.push_id)])
        for index in range(self._opening.manifest.fragment_count):
            self.connection.send(self._opening.fragment(index))

    def _receive(self) -> None:
        staging, manifest, codec = self._opening.staging, self._opening.manifest, self._opening.codec
        if codec.in_place:
            self.connection.receive(staging.room(), staging.begin_to_fill, self._notice)
            return
        room = memoryview(bytearray(codec.max_size_bytes(manifest)))
        for index in range(manifest.fragment_count):
            data = room[: codec.size_bytes(manifest, index)]
            self.connection.receive(data, unheard=self._notice)
            staging.put(index, data, codec)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.problem = self.problem or error
            if not self._over.wait(self._last_word_s):
                self.gave_up = True
                self.give_up()
