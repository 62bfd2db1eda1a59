"""What the launcher needs of whatever runs parameter servers and workers: this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ps_worker.engines.processes import EventPipe, LineHandler, Processes

__all__ = ["Cluster", "Engine", "EngineError", "WorkerState", "server_name"]


class EngineError(Exception):
    """The cluster cannot be run; the message says why, and what to do."""


@dataclass(frozen=True)
class WorkerState:
    """How it stands with a worker.

    Args:
        name: what people call it.
        exit_code: with which it ended for good; negative: the signal that ended it; None: it has not.
        restarts: how often it was started again.
    """

    name: str
    exit_code: int | None = None
    restarts: int = 0


class Cluster(Protocol):
    """Parameter servers, a shard each, and their workers."""

    num_servers: int
    """How many parameter servers it has."""
    num_workers: int
    """How many workers a round waits for."""
    addresses: tuple[str, ...]
    """HOST:PORT of each parameter server, in the order of the shards; empty until they listen."""
    center_at: tuple[Path, ...]
    """Where each parameter server keeps the center on disk; empty: nowhere."""

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
        events: EventPipe | None = None,
    ) -> None:
        """Starts worker ``index``, once the servers listen: Python with the arguments ``command``.

        The handlers get each line of its stdout and of its stderr; ``events`` is one more pipe for it.
        """

    async def workers_done(self) -> None:
        """Returns when every worker has ended well and all that it printed was handed on.

        Raises:
            ProcessFailedError: a worker failed, or a server ended.
            Exception: what a handler of lines raised.
        """

    def worker_states(self) -> list[WorkerState]:
        """Of the workers that were started, in their order."""


Engine = Callable[[Processes, LineHandler], AbstractAsyncContextManager[Cluster]]
"""Makes a cluster that ends with its context; the handler gets each line that a parameter server logs."""


def server_name(index: int) -> str:
    """What people call the parameter server with the shard ``index``."""
    return f"ps-{index}"
