"""The last events of the log, for the page."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelaverage.logs import event_of

__all__ = ["LogEvent", "LogTail", "MAX_EVENTS"]

MAX_EVENTS = 100
"""The newest events are kept."""
# Texts may contain names that clients choose.
_LONGEST_TEXT = 500


@dataclass(frozen=True)
class LogEvent:
    """One line of the log.

    Args:
        number: counts all lines from 1.
        at: when, as Unix time.
        level: such as warning.
        name: of the event, in the table of modelaverage/logs.py.
        text: the message.
    """

    number: int
    at: float
    level: str
    name: str
    text: str


class LogTail(logging.Handler):
    """Keeps the last lines from level INFO on. Safe for any thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._number = 0
        self._events = deque[LogEvent](maxlen=MAX_EVENTS)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one line. `logging` holds the handler's lock."""
        self._number += 1
        text = record.getMessage()
        text = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."
        self._events.append(LogEvent(self._number, record.created, record.levelname.lower(), event_of(record), text))

    def events(self) -> list[LogEvent]:
        """The last lines, the newest last."""
        self.acquire()
        try:
            return list(self._events)
        finally:
            self.release()

    @contextmanager
    def attached(self, log: logging.Logger) -> Iterator[None]:
        """Keeps the lines of ``log`` inside the context."""
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)
