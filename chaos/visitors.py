"""Connections that strangers open and leave silent for a moment: each takes a descriptor of the server."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

from modelaverage.addresses import parse

__all__ = ["Visitors"]

_FEWEST_AT_ONCE, _MOST_AT_ONCE = 2, 12
_LONGEST_STAY_S = 1.0
_TIMEOUT_S = 1.0


class Visitors:
    """Opens such connections until `end`, on a separate thread.

    Args:
        address: of the server, HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        where = parse(address)
        self._address = where.host, where.port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._come, name="visitors", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stops opening connections."""
        self._over.set()
        self._thread.join()

    def _come(self) -> None:
        chance = random.Random(0)
        while not self._over.is_set():
            with contextlib.ExitStack() as here:
                for _ in range(chance.randint(_FEWEST_AT_ONCE, _MOST_AT_ONCE)):
                    with contextlib.suppress(OSError):  # the server is away, or has no descriptor left
                        here.enter_context(socket.create_connection(self._address, _TIMEOUT_S))
                self._over.wait(chance.uniform(0, _LONGEST_STAY_S))
