"""What the launcher needs of whatever runs parameter servers and workers: this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ps_worker.processes import LineHandler, Processes

__all__ = ["Cluster", "Engine", "EngineError", "server_name"]


class EngineError(Exception):
    """The cluster cannot be run; the message says why, and what to do."""


class Cluster(Protocol):
    """Parameter servers, a shard each, and their workers."""

    num_servers: int
    """How many parameter servers it has."""
    num_workers: int
    """How many workers a round waits for."""
    addresses: tuple[str, ...]
    """HOST:PORT of each parameter server, in the order of the shards; empty until they listen."""

    async def start_servers(self) -> None:
        """Returns when all of them listen.

        Raises:
            ProcessFailedError: one ended instead.
            EngineError: one did neither in time, or there is no room for the cluster.
        """

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        on_event: LineHandler | None = None,
    ) -> None:
        """Starts worker ``index``, once the servers listen: Python with the arguments ``command``.

        The handlers get each line of its stdout, its stderr and, if asked for, its events (`EVENTS_FLAG`).
        """

    async def workers_done(self) -> None:
        """Returns when every worker has ended well and all that it printed was handed on.

        Raises:
            ProcessFailedError: a worker failed, or a server ended.
            Exception: what a handler of lines raised.
        """


Engine = Callable[[Processes, LineHandler], AbstractAsyncContextManager[Cluster]]
"""Makes a cluster that ends with its context; the handler gets each line that a parameter server logs."""


def server_name(index: int) -> str:
    """What people call the parameter server with the shard ``index``."""
    return f"ps-{index}"
