"""A server whose process may end, and its side of a call, without gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from modelaverage import wire
from modelaverage.errors import FAULTS, Reason, refusal_metadata, told_reason
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import load_latest
from ps_server.flow.service import ParameterServerService, ServicePolicy
from ps_server.machine.reserve import Reserve
from tests.refusals.kinds import Kind, Result, Wrong

__all__ = ["Context", "Died", "Refused", "Server", "next_message"]

_STALL_TIMEOUT_S = 1.0


class Died(Exception):  # noqa: N818
    """The server ended its process."""


class Context:
    """gRPC's side of a call, as the handler sees it."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.down: asyncio.Queue[bytes] = asyncio.Queue()
        self.takes = asyncio.Event()  # unset: writes wait
        self.takes.set()
        self.refused: tuple[Reason, str] | None = None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def read(self) -> Any:
        message = await self.up.get()
        return grpc.aio.EOF if message is None else message  # type: ignore[attr-defined]

    async def write(self, message: bytes) -> None:
        await self.takes.wait()
        self.down.put_nowait(bytes(message))

    async def abort(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...]) -> None:
        reason = Reason[told_reason(metadata)]
        assert (code.name, metadata) == (FAULTS[reason].status, refusal_metadata(reason))
        self.refused = reason, details
        raise grpc.aio.AbortError


class Refused(Exception):  # noqa: N818
    """The server has refused a call."""

    def __init__(self, reason: Reason | None, details: str) -> None:
        super().__init__(f"{reason}: {details}")
        self.reason = reason


class Server:
    """A service whose process may end, and is restarted from its checkpoints."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind, self.directory, self.result = kind, directory, Result()
        self.service: ParameterServerService | None = None
        self.home: CheckpointHome | None = None
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        shared = any(way == "shared" for way in self.kind.ways)
        checkpoints = CheckpointPolicy(self.directory) if self.kind.keeps else None
        policy = ServicePolicy(self.kind.policy, 1 << 20, _STALL_TIMEOUT_S, 0 if shared else math.inf, checkpoints)
        restored = None
        if self.kind.keeps:
            self.home = CheckpointHome(self.directory)
            restored = load_latest(self.directory)
        self.service = ParameterServerService(
            policy, restored=restored, reserve=Reserve(4), home=self.home, die=self._die
        )
        if "data" in self.kind.ways:
            self.service.data_port.listen(["127.0.0.1"], 0)

    def _die(self, why: str) -> None:
        assert why
        self.result.died += 1
        self.close()
        for task in self.tasks:
            task.cancel()
        raise Died(why)

    def close(self) -> None:
        """Ends everything that the end of the process would end."""
        service, self.service = self.service, None
        if service is not None:
            service.close()
        home, self.home = self.home, None
        if home is not None:
            home.close()

    async def stop(self) -> None:
        if self.service is not None:
            await self.service.stop(0.5)

    def method(self, rpc: str) -> Callable[[Any, Context], Awaitable[Any]]:
        if self.service is None:
            if not self.kind.keeps:
                raise Died("for good: there are no checkpoints")
            self.start()
        assert self.service is not None
        found: Any = self.service.handler().service(_Details(f"/{wire.SERVICE}/{rpc}"))
        kinds: list[Callable[[Any, Context], Awaitable[Any]] | None]
        kinds = [found.unary_unary, found.unary_stream, found.stream_unary, found.stream_stream]
        return next(method for method in kinds if method is not None)

    def call(self, rpc: str, request: bytes | None = None) -> tuple[Context, asyncio.Task[Any]]:
        context = Context()
        task = asyncio.ensure_future(self.method(rpc)(request, context))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return context, task

    @staticmethod
    def ended(context: Context, task: asyncio.Task[Any]) -> Any:
        """The result of a call. Raises Refused."""
        if task.cancelled():
            raise Refused(None, "the server is gone")
        error = task.exception()
        if error is None:
            return task.result()
        if context.refused is not None:
            raise Refused(*context.refused)
        raise Wrong(f"a handler raised {error!r}, which a client sees as UNKNOWN") from error


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[()] = ()


async def next_message(context: Context, task: asyncio.Task[Any]) -> bytes | None:
    """The next message from the server; None when the call has ended."""
    getting = asyncio.ensure_future(context.down.get())
    await asyncio.wait((getting, task), return_when=asyncio.FIRST_COMPLETED)
    if getting.done():
        return getting.result()
    getting.cancel()
    return None if context.down.empty() else context.down.get_nowait()
