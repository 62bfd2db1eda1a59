"""A server that cannot be reached: how long an attempt may take, and whether another one would do better by now."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelaverage.addresses import Address, parse

__all__ = ["Reach"]

# An attempt that gets no answer is given up after so long, the next after twice as long: the server may have another
# address by then, but on a slow link with a full queue before it an attempt takes half a minute.
_FIRST_ATTEMPT_S, _LONGEST_ATTEMPT_S = 2.0, 60.0
# If a server takes a connection in this time, an attempt that has lasted for so long is made to an address that it had
# before, or has not heard yet that it is there again.
_LOOK_TIMEOUT_S, _LASTING_S = 0.5, 3.0
_LOOK_INTERVAL_S = 1.0


class Reach:
    """How one server is reached. For one thread at a time.

    Args:
        address: of the server.

    Attributes:
        attempt_s: how long an attempt to connect may take.
    """

    def __init__(self, address: str) -> None:
        self.attempt_s = _FIRST_ATTEMPT_S
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
        pause_s = _LASTING_S
        while not over.wait(pause_s) and self._is_away and not is_connected():
            if _answers(self._where) and self._is_away and not is_connected() and not over.is_set():
                another_way()
                return
            pause_s = _LOOK_INTERVAL_S


def _parsed(address: str) -> Address | None:
    try:
        where = parse(address)
    except ValueError:
        return None
    return None if where.path else where


def _answers(where: Address) -> bool:
    try:
        socket.create_connection((where.host, where.port), _LOOK_TIMEOUT_S).close()
    except (OSError, UnicodeError):
        return False
    return True
