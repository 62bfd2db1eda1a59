"""The signals that end the launcher and a worker, and the exit codes for them."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["STOP_SIGNALS", "end_at_once_on_signals", "end_cleanly_on_sigterm", "exit_code_for"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_code_for(number: int) -> int:
    """128 + the signal's number, as shells have it: 130 for Ctrl-C."""
    return 128 + number


def end_at_once_on_signals() -> None:
    """While there is nothing to clean up: no traceback, even from the middle of an import."""

    def end(number: int, _: FrameType | None) -> None:
        os._exit(exit_code_for(number))

    for number in STOP_SIGNALS:
        signal.signal(number, end)


def end_cleanly_on_sigterm() -> None:
    """SIGTERM unwinds this process: the session says goodbye. A container's first process would ignore it otherwise."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break off the goodbye
        raise SystemExit(exit_code_for(number))

    signal.signal(signal.SIGTERM, end)
