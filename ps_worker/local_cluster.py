"""One parameter server and its workers as processes of this machine, until the workers are done or anything fails."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

from ma_client.cluster import ClusterSpec
from ps_worker.processes import Child, LineHandler, Processes, all_end_well

__all__ = ["LocalCluster", "ServerNotReadyError"]

_READY_TIMEOUT_S = 30.0


class ServerNotReadyError(Exception):
    """The parameter server did not say in time that it listens."""


class LocalCluster:
    """A cluster on loopback whose processes belong to ``processes``.

    Args:
        processes: starts and ends them.
        num_workers: how many workers a round waits for.
        on_message: gets each line that the parameter server logs.

    Attributes:
        address: HOST:PORT of the parameter server, once started.
    """

    def __init__(self, processes: Processes, num_workers: int, on_message: LineHandler) -> None:
        self._processes = processes
        self._num_workers = num_workers
        self._on_message = on_message
        self._server: Child | None = None
        self._workers: list[Child] = []
        self.address = ""

    async def start_server(self) -> None:
        """Returns when it listens.

        Raises:
            ProcessFailedError: it ended instead.
            ServerNotReadyError: it did neither within 30 s.
        """
        first_line: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_output(line: str) -> None:
            if not first_line.done():
                first_line.set_result(line)

        serve = ["-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", str(self._num_workers)]
        self._server = self._processes.start(
            "the parameter server",
            [sys.executable, *serve],
            os.environ,
            on_output=on_output,
            on_error=self._on_message,
            ends_last=True,
        )
        changes: list[asyncio.Future[Any]] = [first_line, self._server.exit_code]
        await asyncio.wait(changes, timeout=_READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if self._server.exit_code.done():
            raise await self._server.failure()
        if not first_line.done():
            raise ServerNotReadyError(f"the parameter server does not listen after {_READY_TIMEOUT_S:g} s")
        self.address = first_line.result().split()[-1]  # "... listening on HOST:PORT"

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        on_event: LineHandler | None = None,
    ) -> None:
        """Starts worker ``index`` of the cluster: Python with the arguments ``command``."""
        cluster = ClusterSpec((self.address,), self._num_workers, index)
        environ = {"OMP_NUM_THREADS": str(self._threads_per_worker()), **os.environ, **cluster.to_env()}
        environ["PYTHONUNBUFFERED"] = "1"  # its lines are to be seen when they are printed
        self._workers.append(
            self._processes.start(cluster.worker_id, [sys.executable, *command], environ, on_output, on_error, on_event)
        )

    async def workers_done(self) -> None:
        """Returns when every worker has ended well and all that it printed was handed on.

        Raises:
            ProcessFailedError: a worker failed, or the server ended.
            Exception: what a handler of lines raised.
        """
        assert self._server is not None
        await all_end_well(self._workers, needed=[self._server])

    def _threads_per_worker(self) -> int:
        return max(1, (os.cpu_count() or 1) // self._num_workers)
