"""Notices waits in which no bytes move on a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Silence"]


@dataclass(eq=False)
class _Watched:
    """For what it waits; when bytes last moved; when the wait began; after how long a silence it is reported."""

    doing: str
    moved_at_s: Callable[[], float]
    began_at_s: float
    due_s: float


class Silence:
    """Reports long waits without bytes. One timer watches all waits: to start and cancel one for each fragment takes as
    long as to add the fragment.

    Args:
        notice_s: a silence is reported after this time, then after 3 and 7 times as long, and so on.
        look: called before each report is decided; notes bytes that have moved unseen.
        report: called with what the peer does, and for how many seconds no bytes have moved.
    """

    def __init__(self, notice_s: float, look: Callable[[], None], report: Callable[[str, float], None]) -> None:
        self._notice_s, self._look, self._report = notice_s, look, report
        self._loop = asyncio.get_running_loop()
        self._waits: list[_Watched] = []
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watched(self, doing: str, moved_at_s: Callable[[], float]) -> Iterator[None]:
        """Watches a wait.

        Args:
            doing: what the peer does meanwhile, for the report.
            moved_at_s: when bytes last moved, on the loop's clock.
        """
        wait = _Watched(doing, moved_at_s, self._loop.time(), self._notice_s)
        self._waits.append(wait)
        if self._timer is None:
            self._timer = self._loop.call_later(self._notice_s, self._check)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def end(self) -> None:
        """Stops watching."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._timer = None
        if not self._waits:
            return
        self._look()
        left_s = self._notice_s
        for wait in list(self._waits):
            silent_s = self._loop.time() - max(wait.began_at_s, wait.moved_at_s())
            if silent_s >= wait.due_s:
                wait.due_s = 2 * wait.due_s + self._notice_s
                self._report(wait.doing, silent_s)
            left_s = min(left_s, wait.due_s - silent_s)
        self._timer = self._loop.call_later(left_s, self._check)
