"""Logs that a server is not there yet, while a starting worker waits for it: after 5 s and at growing intervals."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ma_client.transports.connection import Connection
from ma_client.transports.timing import TIMING, Timing
from modelaverage.logs import event

__all__ = ["NoticePace", "connect"]

_log = logging.getLogger("ma_client")


class NoticePace:
    """When to log a wait: after 5 s, 15 s, 35 s, ...

    Args:
        timing: has the time of the first line.
    """

    def __init__(self, timing: Timing = TIMING) -> None:
        self._timing = timing
        self.due_s = timing.first_notice_s
        """The next log line is due this long after the wait began."""

    def said(self) -> None:
        """It was."""
        self.due_s = self._timing.notice_after_s(self.due_s)


def connect(connection: Connection, timeout_s: float) -> None:
    """Like `Connection.connect`, with log lines about the wait."""
    if timeout_s <= connection.timing.first_notice_s:
        connection.connect(timeout_s)
        return
    with _saying_so(connection.address, timeout_s, connection.timing):
        connection.connect(timeout_s)


@contextmanager
def _saying_so(address: str, timeout_s: float, timing: Timing) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(
        target=_say, args=(over, address, timeout_s, timing), name="ma_client-absence", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # no threads are left: wait without log lines
        yield
        return
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(over: threading.Event, address: str, timeout_s: float, timing: Timing) -> None:
    began_at_s, pace = time.monotonic(), NoticePace(timing)
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
