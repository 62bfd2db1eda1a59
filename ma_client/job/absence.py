"""A server that is not there yet: said while a worker waits for it at its start, after 5 s and at growing gaps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ma_client.transports.connection import Shard
from modelaverage.logs import event

__all__ = ["Pace", "connect"]

_log = logging.getLogger("ma_client")
_FIRST_NOTICE_S = 5.0


class Pace:
    """When a wait is to be said: after 5 s, 15 s, 35 s, ..."""

    def __init__(self) -> None:
        self.due_s = _FIRST_NOTICE_S
        """So long after the wait's beginning it is to be said again."""

    def said(self) -> None:
        """It was."""
        self.due_s = 2 * self.due_s + _FIRST_NOTICE_S


def connect(shard: Shard, timeout_s: float) -> None:
    """As `Shard.connect`, and not in silence."""
    if timeout_s <= _FIRST_NOTICE_S:
        shard.connect(timeout_s)
        return
    with _saying_so(shard.address, timeout_s):
        shard.connect(timeout_s)


@contextmanager
def _saying_so(address: str, timeout_s: float) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=_say, args=(over, address, timeout_s), name="ma_client-absence", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no threads are left: in silence, then
        yield
        return
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(over: threading.Event, address: str, timeout_s: float) -> None:
    began_at_s, pace = time.monotonic(), Pace()
    while pace.due_s < timeout_s and not over.wait(began_at_s + pace.due_s - time.monotonic()):
        what = event(
            "server_away", peer=address, cause="no parameter server answers yet", patience_s=timeout_s - pace.due_s
        )
        _log.warning(
            "no parameter server answers at %s yet; trying for up to %g s (%.0f s so far)",
            address,
            timeout_s,
            pace.due_s,
            extra=what,
        )
        pace.said()
