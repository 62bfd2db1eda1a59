"""Starts processes, passes on every line they print, notices when they end, and makes sure that none survives."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ps_worker.engines import leash

__all__ = [
    "Child",
    "EventPipe",
    "LineHandler",
    "ProcessFailedError",
    "Processes",
    "Tail",
    "all_end_well",
    "how_it_ended",
]

LineHandler = Callable[[str], None]

_TAIL_LINES = 15
_MAX_LINE_CHARS = 1 << 16
_LAST_STOP_TIMEOUT_S = 0.7
_KILL_TIMEOUT_S = 0.5
# A process that has left the session may keep a pipe open indefinitely.
_LAST_LINES_TIMEOUT_S = 5.0
_LAST_LINES_AT_END_TIMEOUT_S = 0.3


@dataclass(frozen=True)
class EventPipe:
    """An additional pipe from a process, for lines that programs read.

    Args:
        flag: tells the process the pipe's file descriptor: the command is started with ``flag`` N appended.
        on_line: called with each line.
    """

    flag: str
    on_line: LineHandler


class ProcessFailedError(Exception):
    """A process ended too early, or with an error. The message has its name and its last lines."""


class Tail:
    """The last lines of a process's stderr; ``handler`` is called with every line."""

    def __init__(self, handler: LineHandler) -> None:
        self._handler = handler
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)

    def add(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(line)
        self._handler(line)

    def failure(self, what: str) -> ProcessFailedError:
        """The exception to raise; ``what`` says how the process ended."""
        last_words = "".join(f"\n  {line}" for line in self._lines)
        return ProcessFailedError(f"{what}{'; its last lines:' if last_words else ''}{last_words}")


@dataclass(eq=False)
class Child:
    """A process that `Processes` started.

    Attributes:
        name: for messages.
        exit_code: done when the process has ended; negative: the signal that ended it.
        tail: of its stderr.
        readers: one for each pipe from it; each is done at the pipe's end, or fails as a handler of lines did.
        ends_last: whether it is stopped after those that are not marked so, because they need it.
        last_stop_timeout_s: how long it may take to stop in that case.
    """

    name: str
    process: subprocess.Popen[bytes]
    exit_code: asyncio.Future[int]
    tail: Tail
    readers: list[asyncio.Task[None]]
    ends_last: bool
    last_stop_timeout_s: float = _LAST_STOP_TIMEOUT_S

    async def all_lines_read(self) -> None:
        """Waits up to 5 s until every line of the ended process was handled. Raises what a handler raised."""
        done, _ = await asyncio.wait(self.readers, timeout=_LAST_LINES_TIMEOUT_S)
        for reader in done:
            reader.result()

    async def failure(self) -> ProcessFailedError:
        """The exception to raise about a process that has ended."""
        await self.all_lines_read()
        return self.tail.failure(f"{self.name} {how_it_ended(self.exit_code.result())}")

    def kill(self, number: int) -> None:
        """Sends a signal to the process and to what it has started in its session."""
        # A group vanishes with its last process; macOS answers EPERM for a group that is ending.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Processes:
    """Processes that end with this context: SIGTERM, then SIGKILL after ``stop_timeout_s`` seconds.

    Needs a running event loop. Every process leads its own session, so a terminal's Ctrl-C does not reach it. On Linux
    it is killed when the loop's thread ends, however that happens.
    """

    def __init__(self, stop_timeout_s: float = 3.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._children: list[Child] = []
        self._opened: list[asyncio.ReadTransport] = []
        self._hurry = asyncio.Event()

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    def hurry(self) -> None:
        """Kills what is left without waiting for it to end by itself."""
        self._hurry.set()

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        on_output: LineHandler,
        on_error: LineHandler,
        events: EventPipe | None = None,
        ends_last: bool = False,
        directory: str | None = None,
        last_stop_timeout_s: float | None = None,
    ) -> Child:
        """Starts ``command``. Raises OSError.

        Args:
            name: for messages.
            command: program (an absolute path) and arguments.
            environ: its environment.
            on_output: called with each line of its stdout, without the newline.
            on_error: called with each line of its stderr.
            events: an additional pipe, and the handler of its lines.
            ends_last: whether to stop it after the other processes, because they need it.
            directory: its working directory; None: that of this process.
            last_stop_timeout_s: how long it may take to stop if it ends last; None: 0.7 s.
        """
        tail = Tail(on_error)
        leashed = [sys.executable, "-I", "-S", str(Path(leash.__file__)), str(os.getpid()), *command]
        with contextlib.ExitStack() as handed_over:
            more_pipes: list[tuple[IO[bytes], LineHandler]] = []
            write_fds: list[int] = []
            if events is not None:
                read_fd, write_fd = os.pipe()
                handed_over.callback(os.close, write_fd)
                more_pipes.append((os.fdopen(read_fd, "rb", buffering=0), events.on_line))
                write_fds.append(write_fd)
                leashed += [events.flag, str(write_fd)]
            process = subprocess.Popen(
                leashed,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=write_fds,
                start_new_session=True,
                cwd=directory,
            )
        assert process.stdout is not None
        assert process.stderr is not None
        pipes = [(process.stdout, on_output), (process.stderr, tail.add), *more_pipes]
        readers = [asyncio.ensure_future(_read_lines(pipe, handler, self._opened)) for pipe, handler in pipes]
        exit_code = asyncio.get_running_loop().create_future()
        stop_timeout_s = _LAST_STOP_TIMEOUT_S if last_stop_timeout_s is None else last_stop_timeout_s
        child = Child(name, process, exit_code, tail, readers, ends_last, stop_timeout_s)
        self._children.append(child)
        threading.Thread(target=_wait, args=(child, asyncio.get_running_loop()), daemon=True).start()
        return child

    async def _end(self) -> None:
        # Processes that others need are stopped after them; otherwise the others would report errors.
        first = [child for child in self._children if not child.ends_last]
        last = [child for child in self._children if child.ends_last]
        last_stop_timeout_s = max((child.last_stop_timeout_s for child in last), default=0.0)
        for children, stop_timeout_s in ((first, self._stop_timeout_s), (last, last_stop_timeout_s)):
            await self._end_with(signal.SIGTERM, children, stop_timeout_s)
            await self._end_with(signal.SIGKILL, children, _KILL_TIMEOUT_S)
        readers = [reader for child in self._children for reader in child.readers]
        if readers:
            await asyncio.wait(readers, timeout=_LAST_LINES_AT_END_TIMEOUT_S)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        # Only now: a process whose pipes are closed earlier would report errors.
        for transport in self._opened:
            transport.close()

    async def _end_with(self, number: int, children: Sequence[Child], timeout_s: float) -> None:
        alive = [child for child in children if not child.exit_code.done()]
        if not alive:
            return
        for child in alive:
            child.kill(number)
        ended = asyncio.ensure_future(_all_done(child.exit_code for child in alive))
        hurry = asyncio.ensure_future(self._hurry.wait())
        waits = [ended] if number == signal.SIGKILL else [ended, hurry]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in (ended, hurry):
            wait.cancel()


async def all_end_well(children: Sequence[Child], needed: Sequence[Child] = ()) -> None:
    """Returns when all ``children`` have ended with exit code 0 and every line of their output was handled.

    Raises:
        ProcessFailedError: one of them failed, or one of ``needed`` ended.
        Exception: raised by a handler of lines.
    """
    while True:
        for child in (*needed, *children):
            if child.exit_code.done() and (child in needed or child.exit_code.result() != 0):
                raise await child.failure()
        for reader in (reader for child in children for reader in child.readers if reader.done()):
            reader.result()
        running = [child for child in children if not child.exit_code.done()]
        if not running:
            break
        readers = [reader for child in children for reader in child.readers if not reader.done()]
        changes: list[asyncio.Future[Any]] = [*readers, *(child.exit_code for child in (*needed, *running))]
        await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
    for child in children:
        await child.all_lines_read()


def how_it_ended(exit_code: int) -> str:
    """An exit code in words; a negative one is the signal that ended the process."""
    return f"was ended by {_signal_name(-exit_code)}" if exit_code < 0 else f"ended with exit code {exit_code}"


def _wait(child: Child, loop: asyncio.AbstractEventLoop) -> None:
    code = child.process.wait()
    with contextlib.suppress(RuntimeError):  # the loop was closed before the process ended
        loop.call_soon_threadsafe(_ended, child, code)


def _ended(child: Child, code: int) -> None:
    child.exit_code.set_result(code)
    child.kill(signal.SIGKILL)


async def _all_done(futures: Iterable[asyncio.Future[int]]) -> None:
    await asyncio.wait(list(futures))


async def _read_lines(pipe: IO[bytes], handler: LineHandler, opened: list[asyncio.ReadTransport]) -> None:
    """Calls the handler with each line of a pipe until its end; very long lines come in pieces. The pipe's transport
    is added to ``opened``; the caller closes it."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    opened.append(transport)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while data := await reader.read(1 << 16):
        *lines, rest = (rest + decoder.decode(data)).split("\n")
        for line in lines:
            handler(line)
        if len(rest) > _MAX_LINE_CHARS:
            handler(rest)
            rest = ""
    if rest:
        handler(rest)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
