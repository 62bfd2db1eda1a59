"""Processes that begin at once: forks of a process that has already imported what they need.

A play that kills a process thirty times otherwise spends most of its time on imports. A forked process runs its module
as `python -m MODULE ARGUMENTS` does: as ``__main__``, in the environment and directory of the test.

python -m tests.prepared FD: the process that is forked; it takes orders from that socket until the other end is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

__all__ = ["Prepared"]

_IMPORTED = ("ps_server.__main__", "ma_client", "tests.killed_server", "tests.killed_worker", "tests.compressed_worker")
_MAX_ORDER_BYTES = 1 << 17  # the environment
_STDERR = 2


class Prepared:
    """A process that runs a module. Its standard output is a pipe; its standard error is that of the test.

    Args:
        module: what it runs.
        arguments: of the command.

    Attributes:
        pid: its id.
        stdout: what it prints.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        output, its_output = os.pipe()
        self._end, its_end = os.pipe()
        order = {"module": module, "arguments": arguments, "environ": dict(os.environ), "cwd": str(Path.cwd())}
        self.pid, self._pidfd = _original().fork(order, [its_output, _STDERR, its_end])
        os.close(its_output)
        os.close(its_end)
        self.stdout: IO[str] = os.fdopen(output)
        self._waiting = threading.Lock()
        self._code: int | None = None

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._code is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Waits for its end; its exit code, or the negative number of the signal that ended it."""
        with self._waiting:
            if self._code is None:
                code = os.read(self._end, 16)
                assert code, "the process that was forked is gone"
                self._code = int(code)
                os.close(self._end)
                os.close(self._pidfd)
            return self._code

    def communicate(self) -> None:
        """Waits until nothing more is printed, and for its end."""
        with self.stdout as lines:
            lines.read()
        self.wait()


class _Original:
    """The process that is forked."""

    def __init__(self) -> None:
        self._orders, its_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_orders:
            number = its_orders.fileno()
            command = [sys.executable, "-m", "tests.prepared", str(number)]
            self._process = subprocess.Popen(
                command, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        self._one_order = threading.Lock()
        atexit.register(self._end)

    def fork(self, order: object, descriptors: list[int]) -> tuple[int, int]:
        """Forks a process; returns its pid and a descriptor of it."""
        with self._one_order:
            socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors)
            answer, received, _, _ = socket.recv_fds(self._orders, 16, 1)
        return int(answer), received[0]

    def _end(self) -> None:
        self._orders.close()
        self._process.wait()


@functools.cache
def _original() -> _Original:
    return _Original()


def _next_order(orders: socket.socket) -> dict[str, Any]:
    """Forks a process for each order, and tells the ends of those processes. Returns, with its order, in each."""
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # by descriptor: the pid, and where its end is told
    while True:
        for ready, _ in poll.poll():
            if ready != orders.fileno():
                poll.unregister(ready)
                _tell_end(ready, *running.pop(ready))
                continue
            order, descriptors, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 3)
            if not order:  # the test process has ended
                os._exit(0)
            output, errors, end = descriptors
            pid = os.fork()
            if pid == 0:
                os.dup2(output, 1)
                os.dup2(errors, 2)
                for descriptor in (*descriptors, *running, *(end for _, end in running.values())):
                    os.close(descriptor)
                orders.close()
                return dict(json.loads(order))
            os.close(output)
            os.close(errors)
            process = os.pidfd_open(pid)
            socket.send_fds(orders, [str(pid).encode()], [process])
            running[process] = pid, end
            poll.register(process, select.POLLIN)


def _tell_end(process: int, pid: int, end: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(end, str(code).encode())
    os.close(end)
    os.close(process)


def _run(module: str, arguments: list[str], environ: dict[str, str], cwd: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [module, *arguments]
    name = f"{module}.__main__" if hasattr(sys.modules.get(module), "__path__") else module
    sys.modules.pop(name, None)  # it runs again, as the main module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    _run(**_next_order(socket.socket(fileno=int(sys.argv[1]))))
