"""Threads that are not to be had: limits on processes (`ulimit -u`, a container's pids) count them."""

from __future__ import annotations

import ctypes

from modelaverage.errors import ServerUnavailableError

__all__ = ["is_about_threads", "keep_for_ever", "without_thread"]


def is_about_threads(error: RuntimeError) -> bool:
    """Whether this is what Python raises when the system gives it no thread."""
    return "new thread" in str(error)


def without_thread(what: str, error: RuntimeError) -> ServerUnavailableError:
    """The exception that says ``what`` could not be done; trying again may help."""
    return ServerUnavailableError(
        f"{what}: {error}; raise the limit on processes (ulimit -u, pids.max of the container's cgroup)"
    )


def keep_for_ever(thing: object) -> None:
    """It is never deleted, not even when this process ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
