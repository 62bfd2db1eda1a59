"""What to do when the system gives no thread: limits on processes (`ulimit -u`, a container's pids) count threads."""

from __future__ import annotations

import ctypes

from modelaverage.errors import ServerUnavailableError

__all__ = ["is_about_threads", "keep_for_ever", "without_thread"]


def is_about_threads(error: RuntimeError) -> bool:
    """Whether Python raised this because the system gave it no thread."""
    return "new thread" in str(error)


def without_thread(what: str, error: RuntimeError) -> ServerUnavailableError:
    """The exception for ``what`` could not be done; trying again may help."""
    return ServerUnavailableError(
        f"{what}: {error}; raise the limit on processes (ulimit -u, pids.max of the container's cgroup)"
    )


def keep_for_ever(thing: object) -> None:
    """Keeps the object until this process ends, and does not delete it even then."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
