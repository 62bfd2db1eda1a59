"""Unexpected failures: how they are described, whether the machine causes them, and the last resort of ending."""

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
    """The failure in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text if text.startswith("[Errno") else f"{name}: {text}" if text else name


def is_expected(error: BaseException) -> bool:
    """Whether the machine refused something, such as memory or descriptors; otherwise it is a defect, and its traceback
    should be logged."""
    return isinstance(error, (OSError, MemoryError)) or "start new thread" in str(error)


def end_process(why: str) -> None:
    """Ends this process at once, because its answers might be wrong from here on.

    Checkpoints on disk are intact; the server's supervisor restarts it from the last one.
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
