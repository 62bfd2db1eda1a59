"""Standard output and error that never end a program: what cannot be written is dropped, which is reported once.

If a disk is full, a pipe's reader has gone, a terminal was closed, or the descriptor does not exist, servers and
training go on. A command whose purpose is its output ends instead: with one line, or silently.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

__all__ = ["CLOSED_PIPE_EXIT_CODE", "OnLoss", "OutputLostError", "keep_output", "wait_while_read"]

CLOSED_PIPE_EXIT_CODE = 128 + signal.SIGPIPE
"""The code that shells use for a program that a closed pipe has ended."""
# How long to wait for a descriptor that another program has made non-blocking.
_ROOM_TIMEOUT_MS = 1000
_NAMES = ("stdout", "stderr")

_Words = Callable[[str, int, str], str]
"""Makes a line from the stream's name, how many of its lines are lost (0: not known yet), and why."""


class OutputLostError(OSError):
    """Standard output, the purpose of this program, cannot be written. Raised once; later output is dropped."""

    @property
    def is_closed_pipe(self) -> bool:
        """Whether its reader has gone, which is not an error."""
        return self.errno == errno.EPIPE


class OnLoss(Enum):
    """What happens when standard output cannot be written. Standard error is always dropped.

    Attributes:
        DROP: the program goes on.
        GO_ON: the program goes on, and standard error says so.
        END_WITH_PIPE: OutputLostError if the reader has gone, otherwise as GO_ON.
        END: OutputLostError.
    """

    DROP = "drop"
    GO_ON = "go on"
    END_WITH_PIPE = "end with the pipe"
    END = "end"


_on_loss = OnLoss.DROP


class _Lossy(io.RawIOBase):
    """A descriptor to write to."""

    def __init__(self, descriptor: int, name: str, words: _Words) -> None:
        self._descriptor, self.name, self._words = descriptor, name, words
        self._lost_lines, self._cause = 0, ""
        self._is_lost = self._has_ended = self._is_mid_line = False

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._is_lost:
                self._write_all(self._words_of_loss())
                self._is_lost, self._lost_lines = False, 0
            count = self._write(view)
        except OSError as error:
            self._lose(view, error)
            return len(view)
        return count

    def _words_of_loss(self) -> memoryview:
        line = f"{self._words(self.name, max(1, self._lost_lines), self._cause)}\n"
        return memoryview((f"\n{line}" if self._is_mid_line else line).encode(errors="backslashreplace"))

    def _lose(self, view: memoryview, error: OSError) -> None:
        is_news, self._is_lost = not self._is_lost, True
        self._lost_lines += bytes(view).count(b"\n")
        self._cause = error.strerror or str(error)
        if self.name != "stdout" or self._has_ended:
            return
        if _on_loss is OnLoss.END or (_on_loss is OnLoss.END_WITH_PIPE and error.errno == errno.EPIPE):
            self._has_ended = True
            raise OutputLostError(error.errno, self._cause)
        if is_news and _on_loss is not OnLoss.DROP and sys.stderr is not None:
            with suppress(
                OSError, ValueError, RuntimeError
            ):  # RuntimeError: a signal handler writes while a write is under way
                sys.stderr.write(f"{self._words(self.name, 0, self._cause)}\n")
                sys.stderr.flush()

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._write(view) :]

    def _write(self, view: memoryview) -> int:
        try:
            count = os.write(self._descriptor, view)
        except BlockingIOError:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll(_ROOM_TIMEOUT_MS)
            count = os.write(self._descriptor, view)
        if count:
            self._is_mid_line = view[count - 1] != ord("\n")
        return count


def keep_output(words: _Words, on_loss: OnLoss = OnLoss.DROP) -> None:
    """From now on, output that cannot be written ends this process only if ``on_loss`` says so. May be called again
    with another value. Streams that another program has put into ``sys`` stay.

    Descriptors 0 to 2 that are closed are opened on the null device. Otherwise a file or a connection would get such a
    number, and with it what libraries print.
    """
    global _on_loss
    _on_loss = on_loss
    for descriptor in range(3):
        with suppress(OSError):
            _fill(descriptor)
    for descriptor, name in enumerate(_NAMES, start=1):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(getattr(stream, "buffer", None), _Buffer):
            continue
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        kept = _stream(stream, _Lossy(descriptor if stream is None else stream.fileno(), name, words))
        setattr(sys, name, kept)
        setattr(sys, f"__{name}__", kept)


def wait_while_read(timeout_s: float) -> None:
    """Sleeps, but no longer than standard output has a reader.

    Raises:
        OutputLostError: it is a pipe, a socket or a terminal whose other end has gone.
    """
    try:
        descriptor = sys.stdout.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # there is no such stream, or it has no descriptor
        descriptor, mode = -1, 0
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
        threading.Event().wait(timeout_s)
        return
    poll = select.poll()
    poll.register(descriptor, 0)
    if poll.poll(1000 * timeout_s):
        raise OutputLostError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Buffer(io.BufferedWriter):
    """Marks the streams that this module has made."""


def _stream(like: Any, raw: _Lossy) -> io.TextIOWrapper:
    if like is None:
        return io.TextIOWrapper(_Buffer(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    return io.TextIOWrapper(
        _Buffer(raw),
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=like.line_buffering,
        write_through=like.write_through,
    )


def _fill(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
