"""A parameter server in this process that sessions reach without gRPC or sockets, for tests that are about neither."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from ma_client.transports.in_memory import HALF_CLOSED, SCHEME, SERVERS, MemoryCall
from modelaverage import wire
from modelaverage.errors import REASON_METADATA_KEY
from ps_server.flow.service import ParameterServerService, ServicePolicy

__all__ = ["ServerInMemory"]

_ports = itertools.count(1)
_TIMEOUT_S = 20.0
_UNARY = ("Initialize", "Leave", "GetStatus")
_ONE_REQUEST = ("Pull", "Leave", "GetStatus", "Join")


class ServerInMemory:
    """A server.

    Args:
        policy: of the service.
        grace_s: how long running calls may take to finish when the server stops.
    """

    def __init__(self, policy: ServicePolicy, grace_s: float = 2.0) -> None:
        self.address = f"{SCHEME}:{next(_ports)}"
        self.metrics_address = self.page_url = ""
        self._grace_s = grace_s
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="server-in-memory", daemon=True)
        self._thread.start()
        self.service: ParameterServerService = self._do(lambda: ParameterServerService(policy))
        self.service.helper.start()
        handler = self.service.handler()
        self._handlers = {rpc: _handler_of(handler, rpc) for rpc in (*_UNARY, "Pull", "PushAndAverage", "Join")}
        self._tasks = set[asyncio.Task[None]]()
        SERVERS[self.address] = self

    def begin(self, call: MemoryCall) -> None:
        """As `ServerSide` says."""
        with suppress(RuntimeError):  # it has just stopped
            self.loop.call_soon_threadsafe(self._begin, call)

    def stop(self) -> None:
        """Stops it as SIGTERM would."""
        if SERVERS.pop(self.address, None) is not None:
            self._do(self._stop)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_TIMEOUT_S)
            self.loop.close()

    def _do(self, function: Callable[[], Any]) -> Any:
        """Calls the function on the loop, and returns its result."""

        async def call() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(_TIMEOUT_S)

    def _begin(self, call: MemoryCall) -> None:
        context = _Context(call, self.loop)
        task = self.loop.create_task(self._serve(call, context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        context.serve(task)

    async def _serve(self, call: MemoryCall, context: _Context) -> None:
        try:
            request = await context.read() if call.rpc in _ONE_REQUEST else context
            answer = await self._handlers[call.rpc](request, context)
            if call.rpc in _UNARY:
                call.answer(answer)
            call.end()
        except grpc.aio.AbortError:
            pass  # which has ended it
        except asyncio.CancelledError:
            call.end(None, "UNAVAILABLE", "the server is going down")
        except BaseException as error:
            call.end(None, "UNKNOWN", repr(error))
            raise

    async def _stop(self) -> None:
        await self.service.stop(self._grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.service.close()


class _Context:
    """The part of gRPC's ServicerContext that handlers use."""

    def __init__(self, call: MemoryCall, loop: asyncio.AbstractEventLoop) -> None:
        self._call, self._loop = call, loop
        self._changed = asyncio.Event()

    def serve(self, task: asyncio.Task[None]) -> None:
        """Has the task cancelled when the client cancels the call."""

        def changed() -> None:
            self._changed.set()
            if self._call.is_cancelled:
                task.cancel()

        def on_change() -> None:
            with suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(changed)

        self._call.on_change = on_change
        changed()

    def peer(self) -> str:
        return self._call.peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def read(self) -> Any:
        while (message := self._call.take()) is None:
            self._changed.clear()
            if (message := self._call.take()) is not None:
                break
            await self._changed.wait()
        return grpc.aio.EOF if message is HALF_CLOSED else message  # type: ignore[attr-defined]  # the stubs lack it

    async def write(self, message: bytes) -> None:
        self._call.answer(bytes(message))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._call.end(dict(trailing_metadata).get(REASON_METADATA_KEY), code.name, details)
        raise grpc.aio.AbortError("Locally aborted.")


def _handler_of(handler: grpc.GenericRpcHandler[bytes, bytes], rpc: str) -> Any:
    class Details:
        method = f"/{wire.SERVICE}/{rpc}"
        invocation_metadata = ()

    found = handler.service(Details())  # type: ignore[arg-type]
    assert found is not None
    kinds = found.unary_unary, found.unary_stream, found.stream_unary, found.stream_stream
    return next(kind for kind in kinds if kind is not None)
