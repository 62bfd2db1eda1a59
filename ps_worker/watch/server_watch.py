"""Asks parameter servers for their status without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ma_client import ParameterServerSession
from modelaverage.errors import ModelAverageError
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ServerWatch"]

_TIMEOUT_S = 1.0


class ServerWatch:
    """Connections to parameter servers, used by a thread that only this object has."""

    def __init__(self) -> None:
        self._sessions: dict[str, ParameterServerSession] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def status(self, address: str) -> pb.GetStatusResponse:
        """The status of the server at ``address``. Raises ModelAverageError if it does not answer within a second."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._status, address)

    async def statuses(self, addresses: Iterable[str]) -> list[pb.GetStatusResponse]:
        """The statuses of the servers that answer."""
        found = []
        for address in addresses:
            with contextlib.suppress(ModelAverageError):
                found.append(await self.status(address))
        return found

    def close(self) -> None:
        """Closes the connections, once a call that is under way has ended."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _status(self, address: str) -> pb.GetStatusResponse:
        if address not in self._sessions:
            # No retries and no messages: the caller asks again, and if the server has ended, its exit ends the run.
            self._sessions[address] = ParameterServerSession(
                [address], worker_id="ma-launch", connect_timeout_s=_TIMEOUT_S, reconnect_timeout_s=0
            )
        return self._sessions[address].status(_TIMEOUT_S)

    def _close(self) -> None:
        for session in self._sessions.values():
            session.close()
