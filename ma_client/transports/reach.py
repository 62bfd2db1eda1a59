"""A server that cannot be reached: how long an attempt may take, and whether another one would do better by now."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ma_client.transports.timing import TIMING, Timing
from modelaverage.addresses import Address, parse

__all__ = ["Reach", "takes_connections"]

# An attempt that gets no answer is given up after this time, the next after twice as long: the server may have another
# address by then, but on a slow link with a full queue before it an attempt takes half a minute.
_FIRST_ATTEMPT_S, _LONGEST_ATTEMPT_S = 2.0, 60.0
# If a server takes a connection in this time, an attempt that has lasted for `Timing.lasting_s` is made to an address
# that the server had before, or has not heard yet that the server is there again.
_LOOK_TIMEOUT_S = 0.5


def takes_connections(where: Address) -> bool:
    """Whether there is a server at an address."""
    try:
        socket.create_connection((where.host, where.port), _LOOK_TIMEOUT_S).close()
    except (OSError, UnicodeError):
        return False
    return True


class Reach:
    """How one server is reached. For one thread at a time.

    Args:
        address: of the server.
        timing: how long attempts may last.
        looks: finds out whether there is a server at an address.

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
        """The server is there."""
        self._is_away, self.attempt_s = False, _FIRST_ATTEMPT_S

    def failed(self, lasted_s: float) -> bool:
        """A call did not get through, ``lasted_s`` after it had begun; whether to make longer attempts from now on."""
        self._is_away = True
        if lasted_s < self.attempt_s or self.attempt_s >= _LONGEST_ATTEMPT_S:
            return False
        self.attempt_s = min(2 * self.attempt_s, _LONGEST_ATTEMPT_S)
        return True

    @contextmanager
    def looking(self, another_way: Callable[[], None], is_connected: Callable[[], bool]) -> Iterator[None]:
        """While a call is under way to a server that was away: calls ``another_way``, once, from another thread, when
        the server can be reached, perhaps at a new address, and the call's channel still has not.

        Args:
            another_way: gives up the channel and the call.
            is_connected: whether the channel is.
        """
        if not self._is_away or self._where is None:
            yield
            return
        over = threading.Event()
        arguments = over, another_way, is_connected
        thread = threading.Thread(target=self._look, args=arguments, name="server-lookout", daemon=True)
        with contextlib.suppress(RuntimeError):  # no threads are left: without, then
            thread.start()
        try:
            yield
        finally:
            over.set()  # nobody waits: a name may take long to look up

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
