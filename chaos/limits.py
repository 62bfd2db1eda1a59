"""Limits a process for a while: its descriptors by a resource limit, its threads by a control group."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from chaos.faults import Kind

__all__ = ["DescriptorLimit", "Limit", "ThreadLimit", "limit_with_spare", "limits"]

# Of cgroup v1. A limit on a user's processes does not apply to root, and counts all processes of the user.
_PIDS = Path("/sys/fs/cgroup/pids")
_REMOVALS, _PAUSE_S = 20, 0.05


class Limit(Protocol):
    """A limit that a process can be put under while it runs."""

    def tighten(self, pid: int, spare: int) -> None:
        """Limits the process to ``spare`` more than it has. Raises OSError if the process is gone."""

    def loosen(self, pid: int) -> None:
        """Restores the former limit. Does nothing if the process is gone."""

    def close(self) -> None:
        """Gives the limit up; no process is under it any more."""


def limits(name: str) -> tuple[Mapping[Kind, Limit], str]:
    """The limits that this machine can set for a process; and why it cannot set one, empty if it can set all."""
    found: dict[Kind, Limit] = {"descriptors": DescriptorLimit()}
    try:
        found["threads"] = ThreadLimit(name)
    except OSError as error:
        return found, f"no limit on threads here: {_PIDS}: {error.strerror}"
    return found, ""


def limit_with_spare(numbers: Collection[int], spare: int) -> int:
    """The limit on descriptor numbers that lets a process with these descriptors open exactly ``spare`` more."""
    free = (number for number in range(len(numbers) + spare + 1) if number not in numbers)
    for _ in range(spare):
        next(free)
    return next(free)


class DescriptorLimit:
    """RLIMIT_NOFILE, set from outside."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}

    def tighten(self, pid: int, spare: int) -> None:
        """See Limit."""
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        self._before.setdefault(pid, (soft, hard))
        numbers = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(limit_with_spare(numbers, spare), hard), hard))

    def loosen(self, pid: int) -> None:
        """See Limit."""
        before = self._before.pop(pid, None)
        if before is not None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    def close(self) -> None:
        """See Limit."""


class ThreadLimit:
    """A control group that a process is put into when it is to have no more threads.

    Args:
        name: of the process, for the group's name.

    Raises:
        OSError: there is no such controller, or we may not use it.
    """

    def __init__(self, name: str) -> None:
        self._group = _PIDS / f"chaos-{os.getpid()}-{name}"
        (_PIDS / "cgroup.procs").stat()  # otherwise it could be any folder
        self._group.mkdir()

    def tighten(self, pid: int, spare: int) -> None:
        """See Limit."""
        self._write("pids.max", "max")
        self._write("cgroup.procs", str(pid))
        self._write("pids.max", str(int((self._group / "pids.current").read_text()) + spare))

    def loosen(self, _pid: int) -> None:
        """See Limit."""
        self._write("pids.max", "max")

    def close(self) -> None:
        """See Limit."""
        for _ in range(_REMOVALS):  # the kernel takes a moment to see that it is empty
            with contextlib.suppress(OSError):
                self._group.rmdir()
                return
            time.sleep(_PAUSE_S)

    def _write(self, name: str, text: str) -> None:
        (self._group / name).write_text(text)
