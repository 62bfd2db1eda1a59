"""Runs a command that dies with its parent: `python leash.py PARENT_PID COMMAND [ARGS...]`.

A separate program, not a hook between fork and exec, so that a parent with threads can use it safely. On systems other
than Linux, whose kernels do not offer this, the command just runs.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    """Replaces this process by ``command``; never returns. Exits at once if the parent has died already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The line above does not notice a parent that had died before.
        if os.getppid() != parent_pid:
            os._exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
