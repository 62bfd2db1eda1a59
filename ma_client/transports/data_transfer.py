"""The transfer of one push's bytes on a data connection, up and down at the same time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ma_client.transports.base import OutgoingPush
from ma_client.transports.data_socket import DataSocket
from ma_client.transports.timing import TIMING, Timing
from modelaverage.logs import event
from modelaverage.runtime.data_sockets import NOTICES_IN_SILENCE, NUMBER

__all__ = ["Transfer"]

_log = logging.getLogger("ma_client")
_LOOK_S = 0.1


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
            whole = staging.room()
            self.connection.receive(whole, staging.begin_to_fill, self._notice)
            self._opening.moved.received += len(whole)
            return
        room = memoryview(bytearray(codec.max_size_bytes(manifest)))
        for index in range(manifest.fragment_count):
            data = room[: codec.size_bytes(manifest, index)]
            self.connection.receive(data, unheard=self._notice)
            staging.put(index, data, codec)
            self._opening.moved.received += len(data)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.problem = self.problem or error
            if not self._over.wait(self._last_word_s):
                self.gave_up = True
                self.give_up()
