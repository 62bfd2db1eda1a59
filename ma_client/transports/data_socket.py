"""The client's end of a data connection: a separate socket for the bytes of pushes. The .proto defines the format."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ma_client.transports.data_settings import DataSettings
from modelaverage.access.contexts import Encryption
from modelaverage.runtime.data_sockets import Pace, halves, prepare, use_short_queues, want
from modelaverage.runtime.encrypted_socket import RECORD_BYTES, EncryptedSocket
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["DataSocket"]

_MOST_PARTS = 64
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
        self._encrypted = EncryptedSocket(connection) if isinstance(connection, ssl.SSLSocket) else None
        self.silence_timeout_s = silence_timeout_s
        self.peer = peer
        self.moved_at_s = time.monotonic()
        """When bytes were last sent or received, on the monotonic clock."""
        self._pace = Pace(connection)
        self._is_over = threading.Event()
        if self._encrypted is None:
            connection.settimeout(None)

    @classmethod
    def open(
        cls, host: str, offer: pb.DataConnection, settings: DataSettings, encryption: Encryption | None = None
    ) -> DataSocket:
        """Connects.

        Args:
            host: of the server.
            offer: the server's offer.
            settings: timeouts.
            encryption: encrypts the connection; None: it is in plain text.

        Raises:
            OSError: no server, or another one, answers.
            ValueError, OverflowError: the offer is malformed.
            SecurityError: server and client do not trust each other.
        """
        hello, answer = halves(offer.key)
        connection = socket.create_connection((host, offer.port), settings.connect_timeout_s)
        end_s = time.monotonic() + settings.connect_timeout_s
        try:
            prepare(connection, settings.silence_timeout_s)
            if encryption is not None:
                connection = encryption.encrypted(connection, host)
            connection.sendall(hello)
            came = b""
            while len(came) < len(answer) and (more := connection.recv(len(answer) - len(came))):
                came += more
                connection.settimeout(max(0.001, end_s - time.monotonic()))
            if came != answer:
                raise OSError("what listens there does not know the key")
        except ssl.SSLError as error:  # in TLS 1.3, the server refuses a client's certificate only after the handshake
            connection.close()
            raise error if encryption is None else encryption.named(error, host) from None
        except BaseException:
            connection.close()
            raise
        return cls(connection, settings.silence_timeout_s, f"{host}:{offer.port}")

    @property
    def is_open(self) -> bool:
        """Whether the connection seems usable: between two pushes, only its end makes it readable."""
        return not self._poll(0)

    @property
    def is_spent(self) -> bool:
        """Whether TLS should encrypt no more bytes with its keys."""
        return self._encrypted is not None and self._encrypted.is_spent

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
            sent = self._send(_first(left, self._room()))
            self.moved_at_s = time.monotonic()
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _send(self, parts: Sequence[memoryview]) -> int:
        if self._encrypted is None:
            return self._socket.sendmsg(parts)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        while True:
            try:
                return self._encrypted.send(data)
            except BlockingIOError:
                self._poll(None, select.POLLOUT)

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
            try:
                count = self._receive(room)
            except BlockingIOError:
                unheard()
                continue
            if count == 0:
                raise OSError("the server has closed it")
            self.moved_at_s = time.monotonic()
            heard()
            room = room[count:]

    def _receive(self, room: memoryview) -> int:
        """Waits a while for bytes. Raises BlockingIOError: none arrived."""
        wait_s = self.silence_timeout_s / _LOOKS_IN_SILENCE
        if self._encrypted is None:
            want(self._socket, len(room))
            self._poll(wait_s)
            return self._socket.recv_into(room, flags=socket.MSG_DONTWAIT)
        if not self._encrypted.pending:
            want(self._socket, len(room) - RECORD_BYTES)  # TLS may already have taken in the beginning of a record
            self._poll(wait_s)
        return self._encrypted.recv_into(room)

    def look(self) -> None:
        """Checks whether the kernel is still sending bytes."""
        if self._pace.moves():
            self.moved_at_s = time.monotonic()

    def break_off(self) -> None:
        """Ends a send or receive in progress."""
        self._is_over.set()
        if self._encrypted is not None:
            self._encrypted.end()
            return
        with contextlib.suppress(OSError):  # the other end has already closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket. No send or receive may be in progress."""
        self._socket.close()

    def _poll(self, timeout_s: float | None, events: int = select.POLLIN) -> bool:
        """Waits until bytes can be read, or another event has happened; None: without a limit."""
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _first(parts: Sequence[memoryview], size_bytes: int) -> list[memoryview]:
    """The first ``size_bytes`` of the parts, or all of them if they have fewer."""
    found = []
    for part in parts:
        if size_bytes <= 0:
            break
        found.append(part[:size_bytes])
        size_bytes -= len(part)
    return found
