"""The interface between the launcher and what runs servers and workers: this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from ps_worker.engines.processes import EventPipe, LineHandler, Processes

__all__ = ["Cluster", "Engine", "EngineError", "WorkerState", "server_name"]


class EngineError(Exception):
    """The cluster cannot be run; the message says why, and what to do."""


@dataclass(frozen=True)
class WorkerState:
    """The state of a worker.

    Args:
        name: for messages.
        exit_code: of its last process; negative: the signal that ended it; None: it has not ended for good.
        restarts: how often it was restarted.
    """

    name: str
    exit_code: int | None = None
    restarts: int = 0


class Cluster(Protocol):
    """Parameter servers, each with one shard, and their workers."""

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
            ProcessFailedError: a server ended instead.
            EngineError: a server did not listen in time, or there is no room for the cluster.
        """

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        events: EventPipe | None = None,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts worker ``index``, once the servers listen: Python with the arguments ``command``.

        The handlers are called with each line of its stdout and its stderr; ``events`` is an additional pipe, and
        ``environ`` is added to the worker's environment.
        """

    async def workers_done(self) -> None:
        """Returns when every worker has ended with exit code 0 and every line of their output was handled.

        Raises:
            ProcessFailedError: a worker failed, or a server ended.
            Exception: raised by a handler of lines.
        """

    def worker_states(self) -> list[WorkerState]:
        """The states of the workers that were started, in their order."""


Engine = Callable[[Processes, LineHandler], AbstractAsyncContextManager[Cluster]]
"""Makes a cluster that ends with its context; the handler gets each line that a parameter server logs."""


def server_name(index: int) -> str:
    """The name, for messages, of the parameter server with shard ``index``."""
    return f"ps-{index}"
