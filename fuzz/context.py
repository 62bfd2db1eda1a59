"""A client and gRPC, as the service sees them: messages in, messages out, and an end that may come at any time."""

from __future__ import annotations

import asyncio
import re
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

import modelaverage
from fuzz.loop import VirtualLoop
from modelaverage.errors import FAULTS, Reason, refusal_metadata, told_reason

__all__ = ["ClientCall", "FakeContext", "Failure", "Method", "Refused"]

Method = Callable[[Any, Any], Awaitable[Any]]
# gRPC always refuses more than 16 KiB of metadata, the status message among them.
_MAX_MESSAGE_WIRE_BYTES = 15 << 10


class Failure(Exception):  # noqa: N818  # not an error of the fuzzer, but what it looks for
    """The service broke a rule."""


@dataclass(frozen=True)
class Refused:
    """What `abort` was called with."""

    reason: Reason
    message: str


def _reasons_by_call() -> dict[str, set[Reason]]:
    """By call, the reasons that the protocol file allows it to be refused with."""
    protocol = Path(next(iter(modelaverage.__path__))) / "v1" / "parameter_server.proto"
    allowed: dict[str, set[Reason]] = {}
    for comment, name in re.findall(r"((?:  //.*\n)+)  rpc (\w+)\(", protocol.read_text(encoding="utf-8")):
        words = re.findall(r"[A-Z]+_[A-Z_]*", comment.partition("Errors:")[2])
        allowed[name] = {reason for reason in Reason if any(reason.name.startswith(word) for word in words)}
        allowed[name] |= {Reason.MESSAGE_MALFORMED, Reason.SERVER_OVERLOADED} | (
            {Reason.SERVER_STOPPING} if name != "GetStatus" else set()
        )
    return allowed


_REASONS = _reasons_by_call()


def _wire_bytes(message: str) -> int:
    """The size of a status message: gRPC writes every byte that is not ASCII as three characters."""
    return len(message) if message.isascii() else sum(1 if byte < 0x7F else 3 for byte in message.encode())


class FakeContext:
    """The part of gRPC's ServicerContext that a handler may use.

    Attributes:
        written: the messages that the service sent.
        refused: how the call was aborted, if it was.
        gone: whether the client has vanished; a write then raises as gRPC's does.
        half_closed: whether the client has half-closed.
        is_half_duplex: whether the client wants no message before that.
    """

    def __init__(self, loop: VirtualLoop, rpc: str) -> None:
        self.written: list[bytes] = []
        self.refused: Refused | None = None
        self.gone = False
        self.half_closed = self.is_half_duplex = False
        self._rpc = rpc
        self._loop = loop
        self._inbox: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._room = True

    # For the service.

    def peer(self) -> str:
        """Where the client is, as gRPC names it."""
        return "ipv4:127.0.0.1:1"

    async def read(self) -> Any:
        """The next message, or grpc.aio.EOF."""
        if self._reader is not None:
            raise Failure("two reads at once")
        while not self._inbox:
            if self.half_closed:
                return grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._inbox.popleft()

    async def write(self, message: bytes) -> None:
        """Writes a message; returns when there is room for the next one."""
        if self._writer is not None:
            raise Failure("two writes at once")
        if self.refused is not None:
            raise Failure("a message after the end of the call")
        if self.is_half_duplex and not self.half_closed:
            raise Failure("a message to a half-duplex client before it has half-closed")
        if self.gone:
            raise grpc.aio.InternalError("the client is gone")
        if not self._room:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        self.written.append(bytes(message))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Ends the call with an error; checks that the error is in the table and its message is well formed."""
        if self.refused is not None:
            raise Failure("aborted twice")
        reason = Reason[told_reason(trailing_metadata)]
        self.refused = Refused(reason, details)
        if reason is Reason.SERVER_OVERLOADED:  # no resource is short here, so this is an unexpected exception
            raise Failure(f"{self._rpc} raised something: {details}")
        if trailing_metadata != refusal_metadata(reason) or code.name != FAULTS[reason].status:
            raise Failure(f"{reason.name} came with {code.name} and {trailing_metadata}")
        if reason not in _REASONS[self._rpc]:
            raise Failure(f"the protocol does not allow {self._rpc} to be refused with {reason.name}: {details}")
        if not details.isprintable() or not details:
            raise Failure(f"the message of {reason.name} is not one line: {details!r}")
        if (size_bytes := _wire_bytes(details)) > _MAX_MESSAGE_WIRE_BYTES:
            raise Failure(f"the message of {reason.name} has {size_bytes} bytes on the wire: {details!r}")
        raise grpc.aio.AbortError("Locally aborted.")

    # For the client.

    def deliver(self, message: bytes) -> None:
        """Delivers a message."""
        self._inbox.append(message)
        self._wake(self._reader)

    def half_close(self) -> None:
        """No further message will come."""
        self.half_closed = True
        self._wake(self._reader)

    def set_room(self, room: bool) -> None:
        """Whether the client takes what is written."""
        self._room = room
        if room:
            self._wake(self._writer)

    @property
    def reads(self) -> bool:
        """Whether the client takes what is written."""
        return self._room

    @property
    def blocked(self) -> bool:
        """Whether the service waits for room."""
        return self._writer is not None

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class ClientCall:
    """One call of a client that may do anything.

    Args:
        loop: where the service runs.
        rpc: the call's name.
        method: the handler.
        request: the message of a handler that takes one.
    """

    def __init__(self, loop: VirtualLoop, rpc: str, method: Method, request: bytes | None = None) -> None:
        self.rpc = rpc
        self.request = request
        self.context = FakeContext(loop, rpc)
        self._loop = loop
        self._task = loop.create_task(self._run(method, request))

    async def _run(self, method: Method, request: bytes | None) -> Any:
        return await method(request, self.context)

    def send(self, message: bytes) -> None:
        """Sends one message, unless nothing can be sent any more."""
        if not self.context.half_closed:
            self.context.deliver(message)

    def half_close(self) -> None:
        """Half-closes the call."""
        self.context.half_close()

    def vanish(self, max_steps: int, first_an_end: bool) -> None:
        """The client is gone; the service may read the end of the stream before gRPC cancels the handler."""
        self.context.gone = True
        if first_an_end:
            self.context.half_close()
            self._loop.settle(max_steps)
        self._task.cancel()

    @property
    def done(self) -> bool:
        """Whether the handler has returned or raised."""
        return self._task.done()

    @property
    def completed(self) -> bool:
        """Whether the handler has returned, without an exception."""
        return self._task.done() and not self._task.cancelled() and self._task.exception() is None

    @property
    def response(self) -> Any:
        """The handler's result."""
        return self._task.result()

    def verdict(self) -> str:
        """How the call ended: the reason's name, or another end that is allowed. Raises Failure for any other end."""
        context = self.context
        if self._task.cancelled():
            if not context.gone:
                raise Failure(f"{self.rpc} was cancelled, though the client is there")
            return "(vanished)"
        error = self._task.exception()
        if error is None:
            return "(ok)"
        if isinstance(error, grpc.aio.AbortError) and context.refused is not None:
            return context.refused.reason.name
        if isinstance(error, grpc.aio.InternalError) and context.gone:
            return "(vanished)"
        if isinstance(error, Failure):
            raise error
        trace = "".join(traceback.format_exception(error))
        raise Failure(f"{self.rpc} raised {type(error).__name__}\n{trace}")
