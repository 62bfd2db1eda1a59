"""A command as a user starts it: its output, its end, and the processes that it leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

TIMEOUT_S = 120
MARK = "MA_TEST_MARK"


class Launched:
    """A Python process with a unique mark in its environment, which all its descendants inherit.

    Only ``read_lines`` lines of its output are read, then the pipe is closed; None: all of them. ``environ`` is added
    to the environment.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path | None = None,
        read_lines: int | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, MARK: self._mark, "PYTHONWARNINGS": "error", **(environ or {})},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines, read_lines)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors, None)),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.descendants():
            os.kill(pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _read(self, pipe: IO[str], lines: list[str], count: int | None) -> None:
        with pipe:
            for line in itertools.islice(pipe, count):
                lines.append(line.rstrip("\n"))
                self._news.put(line)
        self._news.put(None)

    def tell(self, line: str) -> None:
        """Writes a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def wait_for(self, *texts: str) -> None:
        """Waits until each of ``texts`` has been printed."""
        open_pipes = 2
        missing = set(texts)
        while missing and open_pipes:
            line = self._news.get(timeout=TIMEOUT_S)
            if line is None:
                open_pipes -= 1
            else:
                missing -= {text for text in missing if text in line}
        assert not missing, f"never printed: {missing}\n{self.printed()}"

    def ended(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code; fails if it does not end in time."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout=5)
        return code

    def printed(self) -> str:
        """The whole output."""
        return "\n".join([*self.lines, *self.errors])

    def descendants(self, part_of_command: str = "") -> list[int]:
        """Pids of all its descendants, without its own."""
        found = []
        for directory in Path("/proc").iterdir():
            try:
                if directory.name.isdigit() and self._mark.encode() in (directory / "environ").read_bytes():
                    command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command and part_of_command in command and int(directory.name) != self.process.pid:
                        found.append(int(directory.name))
            except OSError:
                continue
        return found


def all_gone(pids: Sequence[int], timeout_s: float) -> bool:
    """Whether the processes end within ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ready = poll.poll(1000 * max(0.0, deadline_s - time.monotonic()))
        os.close(descriptor)
        if not ready:
            return False
    return True


def said(launched: Launched) -> list[str]:
    """What it printed on stderr besides the page's address, and that something takes long on a busy machine.

    A process that failed may have logged such a thing, which is then among its last lines, too.
    """
    slow = (" s so far)", "there is no center yet", "ma-launch: page")
    lines = [line for line in launched.errors if not any(text in line for text in slow)]
    last_lines = "; its last lines:"
    return [
        line.removesuffix(last_lines) if not following.startswith("  ") else line
        for line, following in zip(lines, [*lines, ""][1:], strict=True)
    ]
