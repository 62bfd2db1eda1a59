"""Failures that nobody planned for: what they are called, which a machine causes, and the end that beats serving on."""

from __future__ import annotations

import logging
import os
import sys

from modelaverage.logs import event

__all__ = ["describe", "end_process", "is_expected"]

_log = logging.getLogger("ps_server")
# EX_SOFTWARE of sysexits.h.
_EXIT_CODE = 70


def describe(error: BaseException) -> str:
    """One line for people."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text if text.startswith("[Errno") else f"{name}: {text}" if text else name


def is_expected(error: BaseException) -> bool:
    """Whether it is the machine that refuses something, such as memory or descriptors; else it is a defect, whose
    traceback is worth its lines."""
    return isinstance(error, (OSError, MemoryError)) or "start new thread" in str(error)


def end_process(why: str) -> None:
    """Ends this process at once: nobody can tell any more that what it would answer is right.

    Checkpoints on the disk are whole: the server's supervisor starts it again from the last one.
    """
    try:
        _log.critical(
            "%s; the server ends: start it again, from its --checkpoint-dir if it has one",
            why,
            extra=event("failed", cause=why),
        )
        sys.stderr.flush()
    finally:
        os._exit(_EXIT_CODE)
