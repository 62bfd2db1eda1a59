"""One data connection: a socket outside gRPC for the bytes of a worker's pushes. I/O only; no rules of the round."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.logs import event
from modelaverage.runtime.data_sockets import Pace, use_short_queues, want
from modelaverage.runtime.encrypted_socket import RECORD_BYTES, EncryptedSocket
from ps_server.transports.arriving import write_all
from ps_server.transports.silence import Silence

__all__ = ["DataConnection", "lost"]

_log = logging.getLogger("ps_server")


class DataConnection:
    """A connection to one worker's process.

    Args:
        connection: a non-blocking socket; this object owns and closes it.
        worker_id: the worker, for the log.
        notice_s: a stall is logged after this time, then after 3 and 7 times as long, and so on.
        encrypted: encrypts its bytes; None: they are in plain text.
    """

    def __init__(
        self, connection: socket.socket, worker_id: str, notice_s: float, encrypted: EncryptedSocket | None = None
    ) -> None:
        self._socket = connection
        self._encrypted = encrypted
        self._stream = connection if encrypted is None else encrypted
        self._worker_id = worker_id
        self._silence = Silence(notice_s, self.look, self._report)
        self._peer = "{}:{}".format(*connection.getpeername()[:2])
        self._loop = asyncio.get_running_loop()
        self._room = memoryview(b"")  # the part still to be filled
        self._filled: asyncio.Future[None] | None = None
        self._is_watched = False
        self._pace = Pace(connection)
        self.heard_at_s = self._loop.time()
        """When bytes last arrived, on the loop's clock."""
        self.taken_at_s = self.heard_at_s
        """When bytes were last sent."""

    def begin(self) -> None:
        """A push begins."""
        with contextlib.suppress(OSError):  # the next read or write raises it
            use_short_queues(self._socket)
            self._pace.begin()

    def stalled(self, why: str) -> ModelAverageError:
        """The error for a push whose bytes stopped moving here. The client then uses another transport."""
        return lost(why)

    async def receive(self, room: memoryview) -> None:
        """Fills the room. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        self._room, self._filled = room, self._loop.create_future()
        try:
            self._want()
            if not self._is_watched:
                self._loop.add_reader(self._socket, self._read)
                self._is_watched = True
            if self._encrypted is not None and self._encrypted.pending:
                self._read()
            with self._silence.watched("sends nothing", lambda: self.heard_at_s):
                await self._filled
        except OSError as error:
            raise lost(error) from None
        finally:
            self._filled = None

    async def send(self, data: memoryview) -> None:
        """Sends all bytes; returns once the kernel has them. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        try:
            self._pace.moves()
            with self._silence.watched("reads nothing of what is sent", lambda: self.taken_at_s):
                while data:
                    size_bytes = await self._sendable()
                    await write_all(self._stream, data[:size_bytes])
                    self.taken_at_s, data = self._loop.time(), data[size_bytes:]
        except OSError as error:
            raise lost(error) from None

    async def _sendable(self) -> int:
        """Waits until the socket is writable; returns how many bytes to send. Raises OSError."""
        while True:
            before_bytes = self._pace.waiting_bytes
            room_bytes = self._pace.room()
            if self._pace.waiting_bytes < before_bytes:
                self.taken_at_s = self._loop.time()
            if room_bytes:
                return room_bytes
            await asyncio.sleep(self._pace.pause_s)

    def look(self) -> None:
        """Notes bytes that have moved unseen."""
        if self._pace.moves():
            self.taken_at_s = self._loop.time()
        if self._is_watched:
            self._read()  # on a slow link, bytes may have arrived below the wake-up threshold

    def close(self) -> None:
        """Ends it."""
        self._watch_no_longer()
        self._silence.end()
        self._socket.close()

    def _report(self, doing: str, silent_s: float) -> None:
        worker, peer = self._worker_id, self._peer
        what = event("data_connection_waits", worker=worker, peer=peer, waited_s=silent_s)
        _log.warning("%r %s on its data connection for %.0f s", worker, doing, silent_s, extra=what)

    def _read(self) -> None:
        """Reads available bytes. The reader stays registered between fragments, which saves system calls."""
        filled = self._filled
        if filled is None or filled.done():
            self._watch_no_longer()
            return
        before_bytes = len(self._room)
        try:
            self._fill()
            if self._room:
                self._want()
        except OSError as error:
            self._watch_no_longer()
            filled.set_exception(error)
            return
        if len(self._room) < before_bytes:
            self.heard_at_s = self._loop.time()
        if not self._room:
            filled.set_result(None)

    def _fill(self) -> None:
        """Reads available bytes: of a plain socket, what one call gives; of an encrypted one, all, because those left
        inside TLS would wake up nobody. Raises OSError."""
        while self._room:
            try:
                count = self._stream.recv_into(self._room)
            except BlockingIOError:
                return
            if count == 0:
                raise ConnectionResetError("the worker has closed it")
            self._room = self._room[count:]
            if self._encrypted is None:
                return

    def _want(self) -> None:
        # TLS may already have taken in the beginning of a record.
        want(self._socket, len(self._room) - (0 if self._encrypted is None else RECORD_BYTES))

    def _watch_no_longer(self) -> None:
        if self._is_watched:
            self._loop.remove_reader(self._socket)
            self._is_watched = False


def lost(why: object) -> ModelAverageError:
    """The error DATA_CONNECTION_LOST, with this cause."""
    return refusal(Reason.DATA_CONNECTION_LOST, f"the data connection is lost ({why}); push again without it")
