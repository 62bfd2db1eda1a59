"""The server's side of a checkpoint writer (writer.py): a thread that starts the process and talks to it.

The thread exists from the start, so later work cannot fail for lack of a thread. Work waits only for earlier work. The
thread may wait for the disk forever; the server does not wait for the thread when it ends.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from modelaverage.logs import event
from ps_server.checkpoints import writer as program

__all__ = ["Reply", "WriterProcess", "command"]

_log = logging.getLogger("ps_server")
_ROOT = Path(__file__).parents[2]
# How long to wait for a killed process to end. Only a process that waits for the disk takes longer.
_END_TIMEOUT_S = 0.2
_THE_END = "the server ends"


@dataclass(frozen=True)
class Reply:
    """The outcome of one command.

    Args:
        result: the command's result.
        error: the error that it raised; None if it succeeded.
        made: descriptors of the directory and of its lock, if the directory had been removed and was created again. The
            caller closes them.
    """

    result: Any
    error: OSError | None = None
    made: tuple[int, int] | None = None


def command(parent: int) -> list[str]:
    """The command line that starts a checkpoint writer for this process. The writer imports neither modules named by
    the environment nor the user's modules."""
    run = "import sys; sys.path.append(sys.argv.pop()); from ps_server.checkpoints.writer import main; main()"
    return [sys.executable, "-I", "-S", "-B", "-c", run, str(parent), str(_ROOT)]


class WriterProcess:
    """A process that carries out one command at a time.

    Args:
        name: the name of the thread.

    Raises:
        RuntimeError: the system has no thread left.
    """

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Reply], Callable[[], Reply]] | None] = SimpleQueue()
        self._lock = Lock()  # guards the attributes that `close` reads
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._closed = False
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Reply]) -> Future[Reply]:
        """Runs ``work``, which calls `ask`, in the thread. Work cancelled before it has begun does not run.

        Raises:
            OSError: this object is closed.
        """
        done: Future[Reply] = Future()
        with self._lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, _THE_END)
            self._work.put((done, work))
        return done

    def ask(self, request: Sequence[object], descriptors: Sequence[int], stream: Iterable[memoryview] = ()) -> Reply:
        """Has the process execute a command, and waits for its end. Call it in the thread only.

        Args:
            request: the command and its arguments, of types that marshal supports.
            descriptors: descriptors to send with it.
            stream: bytes that follow.

        Raises:
            OSError: no process could be started, or the process ended.
        """
        channel = self._connected()
        try:
            program.send(channel, tuple(request), descriptors)
            for part in stream:
                channel.sendall(part)
            (result, error, is_made), made = program.receive(channel)
        except BaseException as failure:
            is_gone = isinstance(failure, (EOFError, ConnectionError))
            why = self._end(is_gone)  # it may have received part of the request
            if is_gone:
                raise OSError(errno.EPIPE, f"the checkpoint writer {why}; the next checkpoint starts another") from None
            raise
        if is_made and len(made) < 2:
            for descriptor in made:
                os.close(descriptor)
            raise OSError(errno.EMFILE, f"it was made again, but its lock is lost: {os.strerror(errno.EMFILE)}")
        return Reply(result, None if error is None else OSError(*error), (made[0], made[1]) if is_made else None)

    def close(self) -> None:
        """Ends the process and the thread without waiting for them: a hanging disk may keep the process."""
        with self._lock:
            self._closed = True
            self._work.put(None)
            process = self._process
            if process is not None:
                process.kill()
            if self._channel is not None:
                with suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)  # wakes the thread even if the process stays
        if process is not None:
            _reap(process)

    # In the thread.

    def _run(self) -> None:
        done: Future[Reply] | None = None
        while True:
            try:
                item = self._work.get()
                if item is None:
                    break
                done, work = item
                _do(done, work)
            except BaseException as error:  # this thread must survive: work waits for it
                if done is not None and not done.done():
                    done.set_exception(error)
            done = item = work = None  # type: ignore[assignment]  # they may keep a center in memory
        self._end()

    def _connected(self) -> socket.socket:
        """The connection to the process; starts a process if none is running."""
        if self._process is not None and self._process.poll() is not None:
            why = self._end(gone=True)
            _log.warning(
                "the checkpoint writer %s; another one is started",
                why,
                extra=event("checkpoint_writer_ended", cause=why),
            )
        if self._channel is None:
            try:
                self._start()
            except OSError as error:
                why = f"the checkpoint writer cannot be started: {error.strerror or error}"
                raise OSError(error.errno, why) from None
        assert self._channel is not None
        return self._channel

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    command(os.getpid()),
                    stdin=theirs.fileno(),
                    # A reader of the server's output must not wait for a process that hangs with the disk.
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
        except BaseException:
            ours.close()
            raise
        with self._lock:
            self._process, self._channel = process, ours
            closed = self._closed
        if closed:
            self._end()
            raise OSError(errno.ESHUTDOWN, _THE_END)

    def _end(self, gone: bool = False) -> str:
        """Ends the process; returns how it ended, for the log.

        Args:
            gone: whether it has ended already, or is about to.
        """
        with self._lock:
            process, self._process = self._process, None
            if self._channel is not None:
                self._channel.close()
            self._channel = None
        if process is None:
            return "is not there"
        if not gone:
            process.kill()
        code = _reap(process)
        if code is None or not gone:
            return f"(process {process.pid}) does not answer"
        return f"(process {process.pid}) was ended by signal {-code}" if code < 0 else f"(process {process.pid}) ended"


def _do(done: Future[Reply], work: Callable[[], Reply]) -> None:
    try:
        if not done.set_running_or_notify_cancel():
            return
        reply = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(reply)


def _reap(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code. A process that does not end now is killed; then None."""
    try:
        return process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.returncode = -signal.SIGKILL  # it ends when the disk responds; Popen must not wait for that
        return None
