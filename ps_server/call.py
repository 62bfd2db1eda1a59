"""One streaming call: reads, writes, and ends that come from outside. I/O only; no rules of the round.

A call may end because its client stalls or because something elsewhere decided so (`fail`), while its own tasks are
blocked in a read or a write. `run` watches for both.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc.aio

from modelaverage.errors import ModelAverageError, Reason, refusal

__all__ = ["Call"]

T = TypeVar("T")

_numbers = itertools.count(1)


class Call:
    """A streaming call of one client.

    Args:
        context: gRPC's side of it; messages are bytes.
        stall_timeout_s: the call fails with STREAM_STALLED when the client keeps it waiting for longer.
    """

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes], stall_timeout_s: float) -> None:
        self.number = next(_numbers)
        self.expecting = False  # True while the client owes messages
        self._context = context
        self._stall_timeout_s = stall_timeout_s
        self._writing = False
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

    async def write(self, message: bytes) -> None:
        """Sends one message. Returns when gRPC has room for the next: a slow client holds up only its own call."""
        self._writing, self._active_at_s = True, self._loop.time()
        await self._context.write(message)
        self._writing = False

    async def run(self, main: Coroutine[Any, Any, T], beside: Coroutine[Any, Any, None] | None = None) -> T:
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
