"""Asks the parameter server what it is doing, without holding up the event loop."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from ma_client import ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.events import ServerEvent

__all__ = ["ServerWatch"]

_TIMEOUT_S = 1.0


class ServerWatch:
    """A connection to the server at ``address``, used from one thread of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session: ParameterServerSession | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def sample(self) -> ServerEvent:
        """What it is doing. Raises ModelAverageError if it does not say so within a second."""
        status = await asyncio.get_running_loop().run_in_executor(self._thread, self._status)
        return ServerEvent(
            unix_time_s=time.time(),
            phase=pb.Phase.Name(status.phase).removeprefix("PHASE_").lower(),
            global_step=status.global_step,
            received_bytes=status.received_bytes,
            sent_bytes=status.sent_bytes,
            waiting_for=tuple(status.waiting_for),
        )

    def close(self) -> None:
        """Ends the connection, after the question that is being asked if there is one."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _status(self) -> pb.GetStatusResponse:
        if self._session is None:
            self._session = ParameterServerSession([self._address], worker_id="ma-launch", connect_timeout_s=_TIMEOUT_S)
        return self._session.status(_TIMEOUT_S)

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
