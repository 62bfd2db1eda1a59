"""gRPC's health service, https://grpc.io/docs/guides/health-checking: for orchestrators and load balancers.

It does not use the servicer of grpcio-health-checking (1.81): if one of two clients that watch a service leaves, the
other gets no more updates; and a watching client delays the server's end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["Health"]

_Context = grpc.aio.ServicerContext[Any, Any]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the stubs have no such module
    """Which services are serving.

    Args:
        serving: names that serve from the start.
        not_yet: names that do not serve until `serve` is called with them.
    """

    def __init__(self, serving: tuple[str, ...], not_yet: tuple[str, ...]) -> None:
        self._statuses = {**dict.fromkeys(serving, _SERVING), **dict.fromkeys(not_yet, _NOT_SERVING)}
        self._changed = asyncio.Event()
        self._stopping = False

    def serve(self, *names: str) -> None:
        """From now on these names serve."""
        if not self._stopping:
            self._statuses.update(dict.fromkeys(names, _SERVING))
            self._wake()

    def stop(self) -> None:
        """Nothing serves any more; clients that watch are told, and their calls end."""
        self._stopping = True
        self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """The status of one name; NOT_FOUND if there is no such name."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        """The status of one name now, and again whenever it changes."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._stopping:
                return
            else:
                await changed.wait()
