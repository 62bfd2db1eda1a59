"""Parameter servers and their workers as local processes, until the workers are done or something fails."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from ma_client.cluster.resolvers import FRESH
from ma_client.cluster.spec import ClusterSpec
from modelaverage.commands.serve_flags import ServeFlags
from ps_worker.engines.engine import EngineError, WorkerState, server_name
from ps_worker.engines.local_worker import LocalWorker
from ps_worker.engines.processes import Child, EventPipe, LineHandler, Processes, ProcessFailedError, how_it_ended

__all__ = [
    "LocalCluster",
    "LocalConfig",
    "automatic_servers",
    "center_directories",
    "started_again",
    "usable_cores",
]

_READY_TIMEOUT_S = 30.0
# A server with a checkpoint directory may have to write a checkpoint before it ends.
_CHECKPOINT_STOP_TIMEOUT_S = 10.0
_PART = re.compile(r"ps-[0-9]+")
_PAGE = re.compile(r" page at (https?://\S+)$")
_CHECKPOINT = re.compile(r"center-.*\.safetensors")
# Only for a worker's first process: a chief that is restarted finds the center that it has initialized.
_FIRST_START_ONLY = frozenset({FRESH})


def usable_cores() -> int:
    """How many processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def automatic_servers(num_workers: int, cores: int) -> int:
    """How many parameter servers `--ps auto` starts on one machine.

    A server keeps one core busy, and the workers' side of the transfer another. So there is one server for every two
    cores that the workers leave: at least one, and at most one for each worker, because one worker keeps at most one
    server busy.
    """
    return max(1, min(num_workers, (cores - num_workers) // 2))


@dataclass(frozen=True)
class LocalConfig:
    """What to run on this machine.

    Args:
        num_servers: how many parameter servers.
        num_workers: how many workers a round waits for.
        serve: further flags of the servers.
        max_restarts: how often each worker that fails is restarted.
        must_be_new: whether the chief, when it is first started, refuses to go on from a center that is there already.
        has_page: whether the last server serves a page that shows the run, on a free port.
    """

    num_servers: int
    num_workers: int
    serve: ServeFlags = field(default_factory=ServeFlags)
    max_restarts: int = 0
    must_be_new: bool = False
    has_page: bool = False


class LocalCluster:
    """A `Cluster` on loopback whose processes belong to ``processes``.

    Args:
        processes: starts and ends them.
        config: what to run.
        on_message: called with each line that a parameter server logs, after its name, and with news of workers.
    """

    def __init__(self, processes: Processes, config: LocalConfig, on_message: LineHandler) -> None:
        self.num_servers = config.num_servers
        self.num_workers = config.num_workers
        self.addresses: tuple[str, ...] = ()
        self.center_at = center_directories(config.serve.checkpoint_dir, config.num_servers)
        self._config = config
        self._processes = processes
        self._on_message = on_message
        self._servers: list[Child] = []
        self._workers: list[LocalWorker] = []

    async def __aenter__(self) -> LocalCluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:  # so that none is restarted
            worker.ended.cancel()

    async def start_servers(self) -> None:
        """Returns when all listen, within 30 s. Errors are those of `Cluster`."""
        # A page shows all servers, so the one that has it starts when the others' addresses are known.
        alone = 1 if self._config.has_page else 0
        await self._start_servers(range(self.num_servers - alone))
        await self._start_servers(range(self.num_servers - alone, self.num_servers))

    async def _start_servers(self, indexes: range) -> None:
        first_lines = [self._start_server(index) for index in indexes]
        servers = self._servers[indexes.start : indexes.stop]
        all_listen = asyncio.gather(*first_lines)
        changes: list[asyncio.Future[Any]] = [all_listen, *(server.exit_code for server in servers)]
        await asyncio.wait(changes, timeout=_READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for server in self._servers:
            if server.exit_code.done():
                raise await server.failure()
        for server, first_line in zip(servers, first_lines, strict=True):
            if not first_line.done():
                raise EngineError(f"{server.name} is not listening after {_READY_TIMEOUT_S:g} s")
        self.addresses += tuple(line.split()[-1] for line in all_listen.result())  # "... listening on HOST:PORT"

    def _start_server(self, index: int) -> asyncio.Future[str]:
        first_line: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_output(line: str) -> None:
            if not first_line.done():
                first_line.set_result(line)
            elif (url := _PAGE.search(line)) is not None:
                self._announce(f"page: {url[1]}")

        name = server_name(index)
        own = self._config.serve
        if self.center_at:
            own = replace(own, checkpoint_dir=self.center_at[index])
        serve = ["-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", str(self.num_workers)]
        serve += own.to_argv()
        if self._config.has_page and index == self.num_servers - 1:
            serve += ["--page-bind", "127.0.0.1:0"]
            for address in self.addresses:
                serve += ["--page-shard", address]
        server = self._processes.start(
            f"parameter server {name}",
            [sys.executable, *serve],
            os.environ,
            on_output=on_output,
            on_error=lambda line: self._on_message(f"[{name}] {line}"),
            ends_last=True,
            last_stop_timeout_s=_CHECKPOINT_STOP_TIMEOUT_S if self.center_at else None,
        )
        self._servers.append(server)
        return first_line

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        events: EventPipe | None = None,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts worker ``index``; see `Cluster`."""
        cluster = ClusterSpec(self.addresses, self.num_workers, index, must_be_new=self._config.must_be_new)
        whole = {"OMP_NUM_THREADS": str(self._threads_per_worker()), **os.environ, **environ, **cluster.to_env()}
        whole["PYTHONUNBUFFERED"] = "1"  # so that lines appear when they are printed

        def start(again: bool) -> Child:
            name, python = cluster.worker_id, [sys.executable, *command]
            told = started_again(whole) if again else whole
            return self._processes.start(name, python, told, on_output, on_error, events)

        self._workers.append(LocalWorker(cluster.worker_id, start, self._config.max_restarts, self._announce))

    async def workers_done(self) -> None:
        """Returns when every worker has ended well. Errors are those of `Cluster`.

        With a quorum (`--min-workers`), a worker that fails ends the run only if too few are left; otherwise its
        failure is raised once the others have ended.
        """
        min_workers = self._config.serve.min_workers or self.num_workers
        running, failures = list(self._workers), list[ProcessFailedError]()
        while running:
            changes: list[asyncio.Future[Any]] = [server.exit_code for server in self._servers]
            changes += [worker.ended for worker in running]
            await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
            for server in self._servers:
                if server.exit_code.done():
                    raise await server.failure()
            for worker in [worker for worker in running if worker.ended.done()]:
                running.remove(worker)
                try:
                    worker.ended.result()
                except ProcessFailedError as failure:
                    failures.append(failure)
                    if self.num_workers - len(failures) < min_workers:
                        raise
                    assert worker.exit_code is not None
                    how = how_it_ended(worker.exit_code)
                    self._announce(f"{worker.name} {how}; rounds go on without it (--min-workers {min_workers})")
        if failures:
            raise failures[0]

    def worker_states(self) -> list[WorkerState]:
        """See `Cluster`."""
        return [WorkerState(worker.name, worker.exit_code, worker.restarts) for worker in self._workers]

    def _announce(self, what: str) -> None:
        self._on_message(f"ma-launch: {what}")

    def _threads_per_worker(self) -> int:
        return max(1, usable_cores() // self.num_workers)


def center_directories(checkpoint_dir: Path | None, num_servers: int) -> tuple[Path, ...]:
    """Where each server keeps its shard: the directory itself, or, with several servers, a subdirectory for each.

    Raises:
        EngineError: the center there was written by another number of servers.
    """
    if checkpoint_dir is None:
        return ()
    path = checkpoint_dir.absolute()
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise EngineError(f"--checkpoint-dir {checkpoint_dir}: {error.strerror}") from None
    parts = [name for name in names if _PART.fullmatch(name)]
    found = len(parts) or int(any(_CHECKPOINT.fullmatch(name) for name in names))
    if found not in (0, num_servers):
        servers = "1 server" if found == 1 else f"{found} servers"
        raise EngineError(
            f"--checkpoint-dir {checkpoint_dir} has the center of {servers}: give --ps {found} to go on with it, or "
            "another directory"
        )
    return (path,) if num_servers == 1 else tuple(path / server_name(index) for index in range(num_servers))


def started_again(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for the process that replaces a failed worker's."""
    return {name: value for name, value in environ.items() if name not in _FIRST_START_ONLY}
