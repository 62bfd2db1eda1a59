"""One call: messages in, messages out, and ends that come from outside. I/O only; no rules of the round.

A call may end because its client stalls or because something elsewhere decided so (`fail`), while its own tasks are
blocked in a read or a write. `run` watches for both.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from modelaverage import wire
from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Call", "Context", "Traffic"]

Context = grpc.aio.ServicerContext[bytes, bytes]

_T = TypeVar("_T")
_Opening = TypeVar("_Opening", bound=pb.InitializeRequest | pb.PushAndAverageRequest)
_numbers = itertools.count(1)


@dataclass
class Traffic:
    """Bytes of fragments that went through all calls, and how many of them in shared memory."""

    received_bytes: int = 0
    sent_bytes: int = 0
    shared_bytes: int = 0


class Call:
    """A call of one client.

    Args:
        context: gRPC's side of it; messages are bytes.
        traffic: where to count the bytes of fragments.
        stall_timeout_s: the call fails with STREAM_STALLED when the client keeps it waiting for longer.
    """

    def __init__(self, context: Context, traffic: Traffic, stall_timeout_s: float) -> None:
        self.number = next(_numbers)
        self.expecting = False
        """True while the client owes messages."""
        self._context = context
        self._traffic = traffic
        self._stall_timeout_s = stall_timeout_s
        self._writing = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._active_at_s = self._loop.time()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def fail(self, error: ModelAverageError) -> None:
        """Ends the call with ``error``, whatever it is blocked in. The first failure counts."""
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # a failure that comes too late to matter is not worth asyncio's complaint

    async def read(self) -> bytes | None:
        """The client's next message; None when it has half-closed."""
        message = await self._context.read()
        self._active_at_s = self._loop.time()
        return message if isinstance(message, bytes) else None

    async def read_header(self, message_type: type[_Opening]) -> Any:
        """The header that opens the stream. Raises ProtocolError: MESSAGE_MALFORMED or MESSAGE_OUT_OF_ORDER."""
        self.expecting = True
        data = await self.read()
        message = message_type() if data is None else wire.parse(message_type, data)
        if message.WhichOneof("message") != "header":
            came = "the stream ended" if data is None else "another message came"
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, f"{came} where the header belongs; send the header first")
        return message.header

    async def read_fragment(self, message_type: type[_Opening]) -> tuple[int, memoryview] | pb.SharedFragments | None:
        """Index and bytes of the next fragment, or which ones lie in shared memory; None when the client has
        half-closed.

        Raises:
            ProtocolError: MESSAGE_MALFORMED or MESSAGE_OUT_OF_ORDER.
        """
        data = await self.read()
        if data is None:
            return None
        fragment = wire.read_fragment(message_type, data)
        if isinstance(fragment, tuple):
            self._traffic.received_bytes += len(fragment[1])
            return fragment
        if isinstance(fragment, pb.PushAndAverageRequest) and fragment.WhichOneof("message") == "shared":
            return fragment.shared
        raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "another message came where a fragment belongs")

    def count_shared(self, received_bytes: int = 0, sent_bytes: int = 0) -> None:
        """Notes fragments that went through shared memory."""
        self._traffic.received_bytes += received_bytes
        self._traffic.sent_bytes += sent_bytes
        self._traffic.shared_bytes += received_bytes + sent_bytes

    async def write(self, message: bytes) -> None:
        """Sends one message. Returns when gRPC has room for the next: a slow client holds up only its own call."""
        self._writing, self._active_at_s = True, self._loop.time()
        await self._context.write(message)
        self._writing = False

    async def write_fragment(self, index: int, data: memoryview) -> None:
        """Sends one fragment; its bytes are copied before this first waits."""
        await self.write(wire.encode_fragment(index, (data,)))
        self._traffic.sent_bytes += len(data)

    async def run(self, main: Coroutine[Any, Any, _T], beside: Coroutine[Any, Any, None] | None = None) -> _T:
        """Runs ``main`` to its end, with ``beside`` at its side; ends early with the first error, or by `fail`."""
        outcome = asyncio.ensure_future(main)
        tasks: set[asyncio.Future[Any]] = {outcome}
        if beside is not None:
            tasks.add(asyncio.ensure_future(beside))
        self._watch()
        pending = {*tasks, self._failure}
        try:
            while not outcome.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if self._failure.done():
                    self._failure.result()
                for future in done:
                    future.result()
            return outcome.result()
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self) -> None:
        idle_s = self._loop.time() - self._active_at_s if self.expecting or self._writing else 0.0
        if idle_s < self._stall_timeout_s:
            self._watchdog = self._loop.call_later(self._stall_timeout_s - idle_s, self._watch)
            return
        doing = "reads nothing of what is sent" if self._writing else "sends nothing"
        self.fail(
            refusal(
                Reason.STREAM_STALLED,
                f"the client {doing} for {self._stall_timeout_s:g} s (--stream-idle-timeout-s); call again",
            )
        )
