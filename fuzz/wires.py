"""A client's side of data connections: its offers, and the bytes sent and received on each."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuzz.context import Failure
from fuzz.sockets import PLENTY_BYTES, MemorySocket
from fuzz.witness import Given, Key
from modelaverage.manifest import Manifest
from modelaverage.runtime.data_sockets import HALF_KEY_BYTES, NUMBER

__all__ = ["Offer", "Place", "Wire"]

# Worker id and incarnation.
Place = tuple[str, bytes]


@dataclass(eq=False)
class Offer:
    """What an admission has offered.

    Attributes:
        made: the number of the push that it answered; a later offer to the same worker voids it.
        is_used: whether a connection was opened with it.
    """

    place: Place
    key: bytes
    made: int
    is_used: bool = False

    @property
    def hello(self) -> bytes:
        """The greeting that opens the connection."""
        return self.key[:HALF_KEY_BYTES]

    @property
    def answer(self) -> bytes:
        """The server's answer to the greeting."""
        return self.key[HALF_KEY_BYTES:]


@dataclass(eq=False)
class Wire:
    """One connection.

    Attributes:
        socket: the client's end.
        offer: whose key it was opened with; None: with none.
        hello: what is still to be sent of the greeting.
        is_void: when the greeting was whole, the server must not have known its key.
        sending: the push whose bytes go up; None: none, or no push's.
        left: the bytes of it that are still to be sent.
        is_straight: whether nothing but whole pushes has been sent.
        is_gone: closed by the client.
    """

    socket: MemorySocket
    offer: Offer | None
    hello: bytes
    is_void: bool = False
    sending: Key | None = None
    left: bytes = b""
    is_straight: bool = True
    is_gone: bool = False
    _is_half_closed: bool = False
    _reads: bool = True
    _pushed: Given | None = None
    _sent_bytes: int = 0
    _ends: list[int] = field(default_factory=list)
    _came: bytearray = field(default_factory=bytearray)

    @property
    def place(self) -> Place | None:
        """The worker whose connection it also is for the server."""
        return None if self.offer is None or not self.is_known else self.offer.place

    @property
    def is_known(self) -> bool:
        """Whether the server has answered."""
        return self.offer is not None and self.offer.answer == self._came[:HALF_KEY_BYTES]

    def came(self) -> bytes:
        """Reads what has come after the server's answer."""
        self._came += self.socket.inbox
        self.socket.inbox.clear()
        return bytes(self._came[HALF_KEY_BYTES:])

    def check(self) -> None:
        """Raises Failure if the server says something that is not allowed."""
        if self._reads:
            self.came()
        wanted = b"" if self.offer is None or self.is_void or self.hello else self.offer.answer
        if self._came and not (wanted and wanted.startswith(self._came[:HALF_KEY_BYTES])):
            raise Failure(f"a stranger on the data port is answered with {len(self._came)} bytes")
        if self.is_known and self.offer is not None:
            self.offer.is_used = True

    def greet(self, size_bytes: int) -> None:
        """Sends this many bytes of the greeting."""
        self._send(self.hello[:size_bytes])
        self.hello = self.hello[size_bytes:]

    def begin(self, key: Key, given: Given, flat: bytes, manifest: Manifest, number: int) -> None:
        """Begins to send the bytes of a push, after its number or a wrong one."""
        self.sending, self._pushed = key, given
        self.left = NUMBER.pack(number) + flat
        self.is_straight = self.is_straight and number == key[2]
        self._sent_bytes = -NUMBER.size
        self._ends = [manifest.fragment_bounds(index)[1] for index in range(manifest.fragment_count)]

    def send(self, size_bytes: int) -> None:
        """Sends this many bytes of the push."""
        if not self._can_send:
            return
        data, self.left = self.left[:size_bytes], self.left[size_bytes:]
        self._send(data)
        self._sent_bytes += len(data)
        if self.is_straight and self._pushed is not None:
            self._pushed.indexes.update(index for index, end in enumerate(self._ends) if end <= self._sent_bytes)
        if not self.left:
            self.sending = self._pushed = None

    def send_badly(self, data: bytes) -> None:
        """Sends bytes that are no push's."""
        self.is_straight = self.is_straight and not data
        self._send(data)

    def set_reading(self, reading: bool) -> None:
        """Sets whether the client reads what comes; if it does not, the server can send little more."""
        self._reads = reading
        # The kernel always accepts this much from a client that greets.
        self.socket.room_bytes = PLENTY_BYTES if reading else HALF_KEY_BYTES

    def end(self, how: str) -> None:
        """Closes the connection or one direction, or breaks it off."""
        if self.is_gone or self.socket.is_reset:
            return
        if how == "half":
            self._is_half_closed = True
            self.socket.half_close()
            return
        self.came()
        self.is_gone = True
        if how == "reset":
            self.socket.reset()
        else:
            self.socket.close()

    def _send(self, data: bytes) -> None:
        if data and self._can_send:
            self.socket.send(data)

    @property
    def _can_send(self) -> bool:
        return not (self.is_gone or self._is_half_closed or self.socket.is_reset)
