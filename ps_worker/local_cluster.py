"""One parameter server and its workers as processes of this machine, until the workers are done or anything fails."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
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
        listens = asyncio.Event()
        with tempfile.TemporaryDirectory(prefix="ma-launch-") as directory:
            ready_file = Path(directory, "ready.json")
            serve = ["-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", str(self._num_workers)]
            self._server = self._processes.start(
                "the parameter server",
                [sys.executable, *serve, "--ready-file", str(ready_file)],
                os.environ,
                on_output=lambda _: listens.set(),  # its first line says so
                on_error=self._on_message,
                ends_last=True,
            )
            listening = asyncio.ensure_future(listens.wait())
            changes: list[asyncio.Future[Any]] = [listening, self._server.exit_code]
            try:
                await asyncio.wait(changes, timeout=_READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                listening.cancel()
            if self._server.exit_code.done():
                raise await self._server.failure()
            if not listens.is_set():
                raise ServerNotReadyError(f"the parameter server does not listen after {_READY_TIMEOUT_S:g} s")
            self.address = json.loads(ready_file.read_text())["address"]

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
