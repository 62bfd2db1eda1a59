"""Processes for the benchmarks: starts a server, and measures the memory of a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["listening_at", "parameter_server", "peak_bytes", "resident_bytes", "running", "serve_command"]


@contextmanager
def parameter_server(
    num_workers: int, *flags: str, unix_socket: bool = False, checkout: Path | None = None
) -> Iterator[tuple[str, int]]:
    """Starts a server on a free port or a Unix socket, with these extra flags; gives its address and its pid.
    ``checkout``: whose code it runs; None: this one's."""
    with tempfile.TemporaryDirectory() as directory:
        bind = f"unix:{directory}/socket" if unix_socket else "127.0.0.1:0"
        with running([*serve_command(bind, num_workers), *flags], checkout) as process:
            yield listening_at(process), process.pid


@contextmanager
def running(command: Sequence[str], checkout: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Runs a command, in ``checkout`` with its code, and terminates it at the end. Ctrl-C does not reach the command:
    the process that has started it also ends it."""
    environ = None
    if checkout is not None:
        environ = {**os.environ, "PYTHONPATH": f"{checkout / 'proto'}{os.pathsep}{checkout}"}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the command inherits this
    try:
        with subprocess.Popen(
            command, cwd=checkout, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                yield process
            finally:
                process.terminate()
                process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_command(bind: str, num_workers: int) -> list[str]:
    """The command that starts a server."""
    return [sys.executable, "-m", "ps_server", "serve", "--bind", bind, "--num-workers", str(num_workers)]


def listening_at(server: subprocess.Popen[str]) -> str:
    """The address at which a started server listens, once it does. Raises RuntimeError if it ends before."""
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("a server has ended before it listened; standard error says why")
    return line.split()[-1]


def resident_bytes(pid: int) -> int:
    """The memory that a process uses now."""
    return _status_bytes(pid, "VmRSS")


def peak_bytes(pid: int, not_counting: str = "") -> int:
    """The most memory that a process has had, without what it has mapped now of shared memory named so.

    A shared page shows up in every process that has it mapped. Counted once: the center's with the server, a
    contribution's with its worker.
    """
    shared = sum(size_bytes for name, size_bytes in _mappings(pid) if name and name == not_counting)
    return _status_bytes(pid, "VmHWM") - shared


def _mappings(pid: int) -> Iterator[tuple[str, int]]:
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.partition("/memfd:")[2].removesuffix(" (deleted)")
        elif line.startswith("Rss:"):
            yield name, int(line.split()[1]) * 1024


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")
