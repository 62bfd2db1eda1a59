"""The signals that end the launcher and a worker, and the exit codes for them."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["STOP_SIGNALS", "end_at_once_on_signals", "end_cleanly_on_signals", "exit_code_for", "stop_signals"]

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


def end_cleanly_on_signals() -> None:
    """SIGTERM and SIGHUP raise SystemExit, so that the session says goodbye. Without a handler, the first process of a
    container would ignore SIGTERM."""
    numbers = [number for number in stop_signals() if number != signal.SIGINT]

    def end(number: int, _: FrameType | None) -> None:
        for ignored in numbers:  # a second signal must not interrupt the goodbye
            signal.signal(ignored, signal.SIG_IGN)
        raise SystemExit(exit_code_for(number))

    for number in numbers:
        signal.signal(number, end)
