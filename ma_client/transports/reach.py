"""A server that cannot be reached: how long an attempt may take, and when to replace it by a new one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ma_client.transports.timing import TIMING, Timing
from modelaverage.addresses import Address, parse

__all__ = ["Reach", "takes_connections"]

# An attempt without an answer is given up after this time, the next after twice as long: the server may have a new
# address by then. But on a slow link with a full queue, an attempt takes half a minute.
_FIRST_ATTEMPT_S, _LONGEST_ATTEMPT_S = 2.0, 60.0
# If the server accepts a connection in this time while an attempt has lasted `Timing.lasting_s`, that attempt uses an
# old address, or has not noticed yet that the server is back.
_LOOK_TIMEOUT_S = 0.5


def takes_connections(where: Address) -> bool:
    """Whether a server accepts connections at an address."""
    try:
        socket.create_connection((where.host, where.port), _LOOK_TIMEOUT_S).close()
    except (OSError, UnicodeError):
        return False
    return True


class Reach:
    """Decides how to reach one server. Used by one thread at a time.

    Args:
        address: the address of the server.
        timing: how long attempts may last.
        looks: checks whether a server accepts connections at an address.

    Attributes:
        attempt_s: how long an attempt to connect may take.
    """

    def __init__(
        self,
        address: str,
        timing: Timing = TIMING,
        looks: Callable[[Address], bool] = takes_connections,
    ) -> None:
        self.attempt_s = _FIRST_ATTEMPT_S
        self._timing = timing
        self._looks = looks
        self._where = _parsed(address)
        self._is_away = False

    def answered(self) -> None:
        """The server has answered."""
        self._is_away, self.attempt_s = False, _FIRST_ATTEMPT_S

    def failed(self, lasted_s: float) -> bool:
        """A call failed to connect after ``lasted_s``. Returns whether later attempts may take longer."""
        self._is_away = True
        if lasted_s < self.attempt_s or self.attempt_s >= _LONGEST_ATTEMPT_S:
            return False
        self.attempt_s = min(2 * self.attempt_s, _LONGEST_ATTEMPT_S)
        return True

    @contextmanager
    def looking(self, another_way: Callable[[], None], is_connected: Callable[[], bool]) -> Iterator[None]:
        """During a call to a server that was away: calls ``another_way`` once, from another thread, when the server
        accepts connections, perhaps at a new address, but the call's channel is still not connected.

        Args:
            another_way: gives up the channel and the call.
            is_connected: whether the channel is connected.
        """
        if not self._is_away or self._where is None:
            yield
            return
        over = threading.Event()
        arguments = over, another_way, is_connected
        thread = threading.Thread(target=self._look, args=arguments, name="server-lookout", daemon=True)
        with contextlib.suppress(RuntimeError):  # no threads are left: do without
            thread.start()
        try:
            yield
        finally:
            over.set()  # do not join the thread: a name lookup may take long

    def _look(self, over: threading.Event, another_way: Callable[[], None], is_connected: Callable[[], bool]) -> None:
        assert self._where is not None
        pause_s = self._timing.lasting_s
        while not over.wait(pause_s) and self._is_away and not is_connected():
            if self._looks(self._where) and self._is_away and not is_connected() and not over.is_set():
                another_way()
                return
            pause_s = self._timing.reach_interval_s


def _parsed(address: str) -> Address | None:
    try:
        where = parse(address)
    except ValueError:
        return None
    return None if where.path else where
