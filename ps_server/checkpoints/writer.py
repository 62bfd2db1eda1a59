"""The checkpoint writer: a process that does the work that may hang with the disk, for its server.

A thread that waits for a hanging disk cannot be ended, not even by SIGKILL, and its process cannot end either. So this
process writes the server's files. It receives one command at a time over a socket, and sends back the answer. It keeps
no state and no lock between commands: a command brings a descriptor of the directory, and one of the center if that
lies in shared memory.

Both ends run the same Python, so marshal suffices; it is small and fast, as the whole process must be.
"""

from __future__ import annotations

import marshal
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ps_server.checkpoints import files

__all__ = ["Answer", "STREAMED", "main", "receive", "send"]

Answer = tuple[Any, tuple[int, str] | None, bool]
"""The result; number and text of the error, if any; whether two descriptors follow: of the directory, which was created
again, and of its lock."""
_LENGTH_BYTES = 8
_MAX_DESCRIPTORS = 2
_STREAM_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1
STREAMED = -1
"""In place of the beginning of a range: its bytes follow on the channel."""


# A message: its length (sent with the descriptors), then its bytes.


def send(channel: socket.socket, message: tuple[Any, ...], descriptors: Sequence[int] = ()) -> None:
    """Sends one message. Raises OSError."""
    content = marshal.dumps(message)
    socket.send_fds(channel, [len(content).to_bytes(_LENGTH_BYTES, "little")], descriptors)
    channel.sendall(content)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Receives one message and its descriptors, or as many of them as this process may open.

    Raises:
        EOFError: the other end is gone.
        OSError: the connection broke.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH_BYTES, _MAX_DESCRIPTORS)
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        head += _receive_exactly(channel, _LENGTH_BYTES - len(head)) if head else b""
        if not head:
            raise EOFError
        return marshal.loads(_receive_exactly(channel, int.from_bytes(head, "little"))), descriptors
    except BaseException:
        _close(descriptors)
        raise


def _receive_exactly(channel: socket.socket, size_bytes: int) -> bytearray:
    content = bytearray(size_bytes)
    at = 0
    with memoryview(content) as view:
        while at < size_bytes:
            received = channel.recv_into(view[at:])
            if received == 0:
                raise EOFError
            at += received
    return content


# Commands. Each begins with the channel and the descriptor of the directory.


def _write(
    channel: socket.socket,
    directory: int,
    memory: int | None,
    made: list[int],
    path: bytes,
    name: str,
    head: bytes,
    ranges: Sequence[tuple[int, int]],
) -> None:
    """Writes a fresh checkpoint: ``head``, then the ``ranges`` of the shared memory. Where a range begins with
    `STREAMED`, its end is the number of bytes that follow on the channel instead."""
    stream = _Stream(channel, sum(end for begin, end in ranges if begin == STREAMED))
    try:
        found = files.find_again(path, directory)
        if found is not None:
            made += found
            directory = found[0]
        files.write(directory, name, _chunks(head, memory, ranges, stream))
    finally:
        stream.drain()


def _chunks(
    head: bytes, memory: int | None, ranges: Sequence[tuple[int, int]], stream: _Stream
) -> Iterator[bytes | memoryview]:
    yield head
    view = memoryview(b"")
    if memory is not None and any(begin != STREAMED for begin, _ in ranges):
        # Maps all pages at once: page faults a few pages at a time would take as long as the copy.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        view = memoryview(mmap.mmap(memory, 0, flags, mmap.PROT_READ))
    for begin, end in ranges:
        if begin == STREAMED:
            yield from stream.take(end)
        else:
            yield view[begin:end]


class _Stream:
    """Bytes that follow on the channel. All of them must be read, even if they are not used."""

    def __init__(self, channel: socket.socket, size_bytes: int) -> None:
        self._channel = channel
        self._left_bytes = size_bytes
        self._block = memoryview(bytearray(min(size_bytes, _STREAM_BYTES)))

    def take(self, size_bytes: int) -> Iterator[memoryview]:
        """The next bytes, block by block."""
        while size_bytes > 0:
            received = self._channel.recv_into(self._block, min(size_bytes, len(self._block)))
            if received == 0:
                raise EOFError
            self._left_bytes -= received
            size_bytes -= received
            yield self._block[:received]

    def drain(self) -> None:
        """Reads the rest."""
        for _ in self.take(self._left_bytes):
            pass


def _flush(directory: int, name: str, keep: int) -> str | None:
    """Makes a fresh checkpoint durable and removes those that it replaces."""
    durable = files.make_durable(directory, name)
    if durable is not None:
        files.prune(directory, durable, keep)
    return durable


# Serving.


def main() -> None:
    """Serves the channel on standard input until its other end is gone."""
    # The server ends its writer, so this process ignores a Ctrl-C or SIGTERM sent to the whole group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _end_with(int(sys.argv[1]))
    with socket.socket(fileno=0) as channel:
        try:
            while True:
                _serve(channel, *receive(channel))
        except (EOFError, OSError):
            return


def _serve(channel: socket.socket, request: tuple[Any, ...], descriptors: list[int]) -> None:
    made = list[int]()
    try:
        send(channel, _answer(channel, request, descriptors, made), made)
    finally:
        _close(made)


def _answer(channel: socket.socket, request: tuple[Any, ...], descriptors: list[int], made: list[int]) -> Answer:
    command, *arguments = request
    result, error = None, None
    try:
        if command == "write":
            memory = descriptors[1] if len(descriptors) > 1 else None
            _write(channel, descriptors[0], memory, made, *arguments)
        else:
            commands: dict[str, Callable[..., Any]] = {
                "start": lambda _: None,
                "tidy": files.remove_unfinished,
                "flush": _flush,
                "remove": files.remove,
            }
            result = commands[command](descriptors[0], *arguments)
    except OSError as failure:
        error = failure.errno or 0, failure.strerror or str(failure)
    except MemoryError:
        error = 0, "there is no memory for it"
    finally:
        _close(descriptors)
    return result, error, bool(made)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _end_with(parent: int) -> None:
    """Has this process killed when its parent ends, even in the middle of a command."""
    if sys.platform == "linux":
        try:
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        except (ImportError, OSError, AttributeError):
            pass  # without prctl, it ends after its current command
    if os.getppid() != parent:
        sys.exit()
