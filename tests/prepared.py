"""Processes that begin at once: forks of a process that has already imported what they need.

A play that kills a process thirty times otherwise spends most of its time on imports. A forked process runs its module
as `python -m MODULE ARGUMENTS` does: as ``__main__``, in the environment and directory of the test.

python -m tests.prepared FD [MODULE...]: the process that is forked. It imports these modules, too, and takes orders
from that socket until the other end is closed.
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
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

__all__ = ["Prepared"]

_IMPORTED = (
    "ps_server.__main__",
    "ma_client",
    "tests.killed_server",
    "tests.killed_worker",
    "tests.compressed_worker",
    "tests.shard_worker",
    "tests.worker_process",
)
# Forks of a process of their own, because most plays need no torch.
_WITH_TORCH = ("tests.overlapped", "ps_worker", "examples.train")
_IMPORTED_WITH_TORCH = ("tests.overlapped", "ps_worker.__main__", "ps_worker.demo.digits", "ps_worker.curves.command")
_MAX_ORDER_BYTES = 1 << 17  # the environment
_STDERR = 2
_ROOT = Path(__file__).parents[1]


class Prepared:
    """A process that runs a module, like `subprocess.Popen` with ``text=True`` of `python -m MODULE ARGUMENTS`.

    Args:
        module: what it runs.
        arguments: of the command.
        pipes: whether its standard input and standard error are pipes, too; otherwise they are /dev/null and those of
            the test.
        warnings_are_errors: whether it raises warnings.
        environ: of the process; None: that of the test.
        cwd: where it runs; None: where the test does.
        with_torch: whether torch is imported before; it is for some modules anyway.

    Attributes:
        pid: its id.
        stdin: for its input, if it is a pipe.
        stdout: what it prints.
        stderr: what it prints there, if it is a pipe.
        returncode: its exit code, or the negative number of the signal that ended it, once `poll` or `wait` knows it.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        pipes: bool = False,
        warnings_are_errors: bool = False,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        with_torch: bool = False,
    ) -> None:
        self._end, its_end = os.pipe()
        output, its_output = os.pipe()
        its_input, given = os.pipe() if pipes else (os.open(os.devnull, os.O_RDONLY), -1)
        errors, its_errors = os.pipe() if pipes else (-1, os.dup(_STDERR))
        order = {
            "module": module,
            "arguments": arguments,
            "environ": dict(os.environ if environ is None else environ),
            "cwd": str(cwd or Path.cwd()),
            "warnings_are_errors": warnings_are_errors,
        }
        its_own = [its_input, its_output, its_errors, its_end]
        self.pid, self._pidfd = _original(with_torch or module in _WITH_TORCH).fork(order, its_own)
        weakref.finalize(self, os.close, self._pidfd)
        for descriptor in its_own:
            os.close(descriptor)
        self.stdin: IO[str] | None = os.fdopen(given, "w") if pipes else None
        self.stdout: IO[str] = os.fdopen(output)
        self.stderr: IO[str] | None = os.fdopen(errors) if pipes else None
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code; None: it still runs."""
        try:
            return self.wait(0.0)
        except TimeoutError:
            return None

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for its end, and returns its exit code. Raises TimeoutError."""
        with self._waiting:
            if self.returncode is None:
                if not select.select([self._end], [], [], timeout_s)[0]:
                    raise TimeoutError(f"process {self.pid} has not ended after {timeout_s} s")
                code = os.read(self._end, 16)
                assert code, "the process that was forked is gone"
                self.returncode = int(code)
                os.close(self._end)
            return self.returncode

    def communicate(self, timeout_s: float | None = None) -> tuple[str, str]:
        """Closes its input, and waits for its end; returns the rest of its output and errors."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        found = ["", ""]

        def read(index: int, pipe: IO[str]) -> None:
            with pipe:
                found[index] = pipe.read()

        pipes = [(index, pipe) for index, pipe in enumerate((self.stdout, self.stderr)) if pipe and not pipe.closed]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in pipes]
        for reader in readers:
            reader.start()
        self.wait(timeout_s)
        for reader in readers:
            reader.join(timeout_s)
        return found[0], found[1]


class _Original:
    """The process that is forked."""

    def __init__(self, with_torch: bool) -> None:
        self._orders, its_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_orders:
            number = its_orders.fileno()
            command = [
                sys.executable,
                "-m",
                "tests.prepared",
                str(number),
                *(_IMPORTED_WITH_TORCH if with_torch else ()),
            ]
            self._process = subprocess.Popen(
                command,
                pass_fds=[number],
                cwd=_ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # read at the import; threads that spin cost the most
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
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
def _original(with_torch: bool) -> _Original:
    return _Original(with_torch)


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
            order, descriptors, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 4)
            if not order:  # the test process has ended
                os._exit(0)
            *standard, end = descriptors
            pid = os.fork()
            if pid == 0:
                for number, descriptor in enumerate(standard):
                    os.dup2(descriptor, number)
                for descriptor in (*descriptors, *running, *(end for _, end in running.values())):
                    os.close(descriptor)
                orders.close()
                return dict(json.loads(order))
            for descriptor in standard:
                os.close(descriptor)
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


def _run(module: str, arguments: list[str], environ: dict[str, str], cwd: str, warnings_are_errors: bool) -> None:
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [module, *arguments]
    if warnings_are_errors:
        warnings.simplefilter("error")
    name = f"{module}.__main__" if hasattr(sys.modules.get(module), "__path__") else module
    sys.modules.pop(name, None)  # it runs again, as the main module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    descriptor, *also = sys.argv[1:]
    for name in (*_IMPORTED, *also):
        importlib.import_module(name)
    _run(**_next_order(socket.socket(fileno=int(descriptor))))
