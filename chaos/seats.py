"""A process that is started again whenever it ends, and that faults strike."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess

from chaos.faults import Fault, Kind
from chaos.limits import Limit

__all__ = ["Seat"]

# For this long after a shortage, its effects may still end the process or cost a checkpoint.
_RECOVERS_S = 1.0
# This long after its start, a process has what it needs to start, but not yet everything that it needs to work.
_AFTER_START_S = 0.3


class Seat:
    """One of the processes of the run, through all of its lives.

    Args:
        name: its name in logs and reports.
        start: starts a process; its argument counts the processes of this seat, from 1.
        finishes: whether the seat is done when its process ends with exit code 0.
        limits: what the process can be made to run out of.

    Attributes:
        starts: how often it was started.
        deaths: how it ended when no fault had ended it.
        squeezed_deaths: how it ended on its own while it lacked something, or soon afterwards.
        done: whether it has finished.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[int], BaseProcess],
        finishes: bool,
        limits: Mapping[Kind, Limit] | None = None,
    ) -> None:
        self.name = name
        self.starts = 1
        self.deaths: list[str] = []
        self.squeezed_deaths: list[str] = []
        self.done = False
        self._limits = limits or {}
        self._happened: list[Fault] = []
        self._for_next: list[Fault] = []
        self._at_start: list[Fault] = []
        self._started_at_s = 0.0
        self._squeezed_until_s: dict[Kind, float] = {}
        self._recovered_at_s = 0.0
        self._start = start
        self._finishes = finishes
        self._killed = False
        self._goes_on_at_s: float | None = None
        self._process = start(1)

    def tend(self, now_s: float) -> None:
        """Restarts the process if it has ended, and continues it if it was stopped for long enough."""
        if self.done:
            return
        code = self._process.exitcode
        if code is None:
            if self._goes_on_at_s is not None and now_s >= self._goes_on_at_s:
                self._go_on()
            while self._at_start and now_s - self._started_at_s > _AFTER_START_S:
                self._squeeze(self._at_start.pop(), now_s)
            for kind in [kind for kind, until_s in self._squeezed_until_s.items() if now_s >= until_s]:
                self._loosen(kind, now_s)
            return
        if code == 0 and self._finishes:
            self.done = True
            return
        if not (self._killed and code == -signal.SIGKILL):
            deaths = self.squeezed_deaths if self.is_squeezed(now_s) else self.deaths
            deaths.append(f"{self.name} ended by itself: process {self.starts}, exit code {code}")
        for kind in list(self._squeezed_until_s):
            self._loosen(kind, now_s)
        self._killed, self._goes_on_at_s = False, None
        self.starts += 1
        self._started_at_s, self._at_start, self._for_next = now_s, self._for_next, []
        self._process = self._start(self.starts)

    def strike(self, fault: Fault, now_s: float) -> None:
        """Lets the fault happen, now or at the next start; nothing happens if the seat is done or has no such limit."""
        self._replace_killed()
        self.tend(now_s)
        if self.done:
            return
        if fault.kind in self._limits and fault.at_start:
            self._for_next = [fault]
        elif fault.kind in self._limits:
            self._squeeze(fault, now_s)
        elif fault.kind == "kill":
            self._signal(signal.SIGKILL)
            self._killed = True
            self._happened.append(fault)
        elif fault.kind == "stop":
            self._signal(signal.SIGSTOP)
            self._goes_on_at_s = max(now_s + fault.lasts_s, self._goes_on_at_s or 0.0)
            self._happened.append(fault)

    def news(self) -> list[Fault]:
        """The faults that have happened since the last time."""
        happened, self._happened = self._happened, []
        return happened

    def is_squeezed(self, now_s: float) -> bool:
        """Whether the process lacks something, or did until a moment ago."""
        return bool(self._squeezed_until_s) or now_s < self._recovered_at_s

    def _squeeze(self, fault: Fault, now_s: float) -> None:
        assert self._process.pid is not None
        with contextlib.suppress(OSError):  # it has just ended
            self._limits[fault.kind].tighten(self._process.pid, fault.spare)
            until_s = self._squeezed_until_s.get(fault.kind, 0.0)
            self._squeezed_until_s[fault.kind] = max(now_s + fault.lasts_s, until_s)
            self._happened.append(fault)

    def _loosen(self, kind: Kind, now_s: float) -> None:
        if self._process.pid is not None:
            self._limits[kind].loosen(self._process.pid)
        del self._squeezed_until_s[kind]
        self._recovered_at_s = now_s + _RECOVERS_S

    def spare(self) -> None:
        """Ends all faults; when this returns, the process runs or has finished."""
        self._replace_killed()
        if self._goes_on_at_s is not None:
            self._go_on()
        for kind in list(self._squeezed_until_s):
            self._loosen(kind, time.monotonic())

    def end(self) -> None:
        """Ends the process."""
        self._signal(signal.SIGKILL)
        self._process.join()
        for limit in self._limits.values():
            limit.close()
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
