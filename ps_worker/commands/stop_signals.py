"""The signals that end the launcher and a worker, and the exit codes for them."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = [
    "STOP_SIGNALS",
    "StoppedBySignal",
    "end_at_once_on_signals",
    "end_cleanly_on_signals",
    "exit_code_for",
    "stop_signals",
]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end this program. A SIGHUP that is ignored (nohup) stays ignored."""
    is_immune = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_immune and number is signal.SIGHUP))


def exit_code_for(number: int) -> int:
    """128 + the signal's number, as shells have it: 130 for Ctrl-C."""
    return 128 + number


def end_at_once_on_signals() -> None:
    """Lets stop signals end the process without a traceback, even in the middle of an import. For use while there is
    nothing to clean up."""

    def end(number: int, _: FrameType | None) -> None:
        os._exit(exit_code_for(number))

    for number in stop_signals():
        signal.signal(number, end)


class StoppedBySignal(SystemExit):
    """A stop signal has come.

    Args:
        number: the signal.

    Attributes:
        progress: how far the work has come, and what follows; empty: unknown.
    """

    def __init__(self, number: int) -> None:
        super().__init__(exit_code_for(number))
        self.exit_code = exit_code_for(number)
        self.progress = ""
        self._name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self._name}" + (f"; {self.progress}" if self.progress else "")


def end_cleanly_on_signals() -> None:
    """Stop signals raise StoppedBySignal, so that the session says goodbye. Without a handler, the first process of a
    container would ignore SIGTERM. A second Ctrl-C ends the process at once."""
    numbers = stop_signals()

    def end(number: int, _: FrameType | None) -> None:
        for other in numbers:  # a second signal must not interrupt the goodbye, unless somebody insists
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        raise StoppedBySignal(number)

    for number in numbers:
        signal.signal(number, end)
