"""Parameter servers and their workers as processes of this machine, until the workers are done or anything fails."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

from ma_client.cluster import ClusterSpec
from ps_worker.engine import EngineError, server_name
from ps_worker.processes import Child, LineHandler, Processes, all_end_well

__all__ = ["LocalCluster", "automatic_servers", "usable_cores"]

_READY_TIMEOUT_S = 30.0


def usable_cores() -> int:
    """How many processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def automatic_servers(num_workers: int, cores: int) -> int:
    """How many parameter servers `--ps auto` starts on one machine.

    A server keeps a core busy, and as much again goes into the workers' side of the transfer. So there is one for every
    two cores that the workers leave; at least one, and not more than there are workers, since one worker moves no more
    than one server does.
    """
    return max(1, min(num_workers, (cores - num_workers) // 2))


class LocalCluster:
    """A `Cluster` on loopback whose processes belong to ``processes``.

    Args:
        processes: starts and ends them.
        num_servers: how many parameter servers.
        num_workers: how many workers a round waits for.
        on_message: gets each line that a parameter server logs, with its name.
        must_be_new: whether the chief refuses to go on from a center that is there already.
    """

    def __init__(
        self,
        processes: Processes,
        num_servers: int,
        num_workers: int,
        on_message: LineHandler,
        must_be_new: bool = False,
    ) -> None:
        self.num_servers = num_servers
        self.num_workers = num_workers
        self.addresses: tuple[str, ...] = ()
        self._processes = processes
        self._on_message = on_message
        self._must_be_new = must_be_new
        self._servers: list[Child] = []
        self._workers: list[Child] = []

    async def start_servers(self) -> None:
        """Returns when all listen, within 30 s. Errors are those of `Cluster`."""
        first_lines = [self._start_server(server_name(index)) for index in range(self.num_servers)]
        all_listen = asyncio.gather(*first_lines)
        changes: list[asyncio.Future[Any]] = [all_listen, *(server.exit_code for server in self._servers)]
        await asyncio.wait(changes, timeout=_READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for server in self._servers:
            if server.exit_code.done():
                raise await server.failure()
        for server, first_line in zip(self._servers, first_lines, strict=True):
            if not first_line.done():
                raise EngineError(f"{server.name} does not listen after {_READY_TIMEOUT_S:g} s")
        self.addresses = tuple(line.split()[-1] for line in all_listen.result())  # "... listening on HOST:PORT"

    def _start_server(self, name: str) -> asyncio.Future[str]:
        first_line: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_output(line: str) -> None:
            if not first_line.done():
                first_line.set_result(line)

        serve = ["-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", str(self.num_workers)]
        server = self._processes.start(
            f"parameter server {name}",
            [sys.executable, *serve],
            os.environ,
            on_output=on_output,
            on_error=lambda line: self._on_message(f"[{name}] {line}"),
            ends_last=True,
        )
        self._servers.append(server)
        return first_line

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        on_event: LineHandler | None = None,
    ) -> None:
        """Starts worker ``index``; see `Cluster`."""
        cluster = ClusterSpec(self.addresses, self.num_workers, index, must_be_new=self._must_be_new)
        environ = {"OMP_NUM_THREADS": str(self._threads_per_worker()), **os.environ, **cluster.to_env()}
        environ["PYTHONUNBUFFERED"] = "1"  # its lines are to be seen when they are printed
        self._workers.append(
            self._processes.start(cluster.worker_id, [sys.executable, *command], environ, on_output, on_error, on_event)
        )

    async def workers_done(self) -> None:
        """Returns when every worker has ended well. Errors are those of `Cluster`."""
        await all_end_well(self._workers, needed=self._servers)

    def _threads_per_worker(self) -> int:
        return max(1, usable_cores() // self.num_workers)
