"""A process that is started again whenever it ends, and that faults strike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from chaos.faults import Fault

__all__ = ["Seat"]


class Seat:
    """One of the processes of the run, through all of its lives.

    Args:
        name: what people call it.
        start: starts it; gets the how-manieth process of this seat that is, from 1.
        finishes: whether it is done when it ends with exit code 0.

    Attributes:
        starts: how often it was started.
        deaths: what ended it that was no fault.
        done: whether it has finished.
    """

    def __init__(self, name: str, start: Callable[[int], BaseProcess], finishes: bool) -> None:
        self.name = name
        self.starts = 1
        self.deaths: list[str] = []
        self.done = False
        self._start = start
        self._finishes = finishes
        self._killed = False
        self._goes_on_at_s: float | None = None
        self._process = start(1)

    def tend(self, now_s: float) -> None:
        """Starts it again if it has ended, and lets it go on when it was stopped for long enough."""
        if self.done:
            return
        code = self._process.exitcode
        if code is None:
            if self._goes_on_at_s is not None and now_s >= self._goes_on_at_s:
                self._go_on()
            return
        if code == 0 and self._finishes:
            self.done = True
            return
        if not (self._killed and code == -signal.SIGKILL):
            self.deaths.append(f"{self.name} ended of itself: process {self.starts}, exit code {code}")
        self._killed, self._goes_on_at_s = False, None
        self.starts += 1
        self._process = self._start(self.starts)

    def strike(self, fault: Fault, now_s: float) -> bool:
        """Lets the fault happen; whether it did. It does not once the seat is done."""
        self._replace_killed()
        self.tend(now_s)
        if self.done:
            return False
        if fault.kind == "kill":
            self._signal(signal.SIGKILL)
            self._killed = True
        else:
            self._signal(signal.SIGSTOP)
            self._goes_on_at_s = max(now_s + fault.lasts_s, self._goes_on_at_s or 0.0)
        return True

    def spare(self) -> None:
        """No more faults: it runs, or has finished, when this returns."""
        self._replace_killed()
        if self._goes_on_at_s is not None:
            self._go_on()

    def end(self) -> None:
        """Ends the process."""
        self._signal(signal.SIGKILL)
        self._process.join()
        self.done = True

    def _replace_killed(self) -> None:
        while self._killed and not self.done:
            self.tend(time.monotonic())

    def _go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self._goes_on_at_s = None

    def _signal(self, number: int) -> None:
        if self._process.exitcode is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)
