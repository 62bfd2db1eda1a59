"""One process of the client program: lines in, lines out, every wait bounded."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO

from modelaverage.conformance.miss import Miss, short

__all__ = ["ANSWER_TIMEOUT_S", "Program"]

# Enough for a process to start and for gRPC to reconnect, on a busy machine.
ANSWER_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 10.0
_LAST_WORDS_TIMEOUT_S = 5.0
_STDERR_LINES = 5


class Program:
    """A client program, started as `COMMAND ADDRESS WORKER_ID`.

    Args:
        command: the words of COMMAND.
        address: of the server.
        worker_id: the worker that it plays.

    Raises:
        OSError: there is no such program.
    """

    def __init__(self, command: Sequence[str], address: str, worker_id: str) -> None:
        self.worker_id = worker_id
        self._process = subprocess.Popen(
            [*command, address, worker_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=_STDERR_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        for target in (self._read, self._write):
            threading.Thread(target=target, daemon=True).start()

    def send(self, line: str) -> None:
        """Gives it a command, without waiting."""
        self._commands.put(line)

    def answer(self, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """The next line that it prints. Raises Miss if none comes within this time, or if its output has ended."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise Miss(f"an answer from {self.worker_id} within {timeout_s:g} s", f"none{self.last_words()}") from None
        if line is None:
            self._listener.join(_LAST_WORDS_TIMEOUT_S)
            last_words = self.last_words()
            self._lines.put(None)  # the next caller finds the end, too
            raise Miss(f"an answer from {self.worker_id}", f"the end of its output{last_words}")
        return line

    def says_nothing(self, for_s: float) -> None:
        """Raises Miss if it answers within this time, in which it should wait."""
        try:
            line = self._lines.get(timeout=for_s)
        except queue.Empty:
            return
        raise Miss(f"{self.worker_id} waits", short(line))

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._commands.put(None)

    def end(self) -> None:
        """Ends its input. Raises Miss unless it prints nothing more and exits with 0."""
        self._commands.put(None)
        try:
            code = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            came = f"it is still running {_END_TIMEOUT_S:g} s after the end of its input"
            raise Miss(f"{self.worker_id} exits", came) from None
        if code:
            self._listener.join(_LAST_WORDS_TIMEOUT_S)
            raise Miss(f"{self.worker_id} exits with 0", f"{code}{self.last_words()}")
        if (line := self._lines.get(timeout=_END_TIMEOUT_S)) is not None:
            raise Miss(f"one line from {self.worker_id} for each command", f"another line: {short(line)}")

    def _read(self) -> None:
        with _stream(self._process.stdout) as stdout:
            for line in stdout:
                self._lines.put(line.removesuffix("\n"))
        self._lines.put(None)

    def _listen(self) -> None:
        with _stream(self._process.stderr) as stderr:
            for line in stderr:
                self._said.append(line.rstrip())

    def _write(self) -> None:
        # On a thread of its own: a program that does not read must not block its caller.
        # It may have ended, which the wait for its answer reports. Then the close fails, too, if a line is left.
        with contextlib.suppress(OSError), _stream(self._process.stdin) as stdin:
            while (line := self._commands.get()) is not None:
                stdin.write(line + "\n")
                stdin.flush()

    def last_words(self) -> str:
        """The end of its stderr, and its answers that nobody has read, a line each."""
        lines = [f"stderr: {line}" for line in list(self._said)]
        while not self._lines.empty():
            line = self._lines.get()
            lines.append("the end of its output" if line is None else f"answer: {line}")
        return "".join(f"\n      {self.worker_id}, {short(line)}" for line in lines)


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
