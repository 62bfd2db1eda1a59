"""Parameter servers and their workers on a Ray cluster: spread over its nodes, and restarted when one dies.

Each has an actor in a placement group, and the actor runs the same process as the local engine.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType, TracebackType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ma_client.cluster.spec import ClusterSpec
from modelaverage.commands.serve_flags import ServeFlags
from ps_worker.engines.engine import EngineError, WorkerState, server_name
from ps_worker.engines.processes import EventPipe, LineHandler
from ps_worker.engines.ray_host import ERROR, EVENT, OUTPUT, Command, RayHost
from ps_worker.engines.ray_process import RayProcess

__all__ = ["RayCluster", "RayConfig"]

_ROOM_POLL_S = 1.0
_POLLS_BEFORE_MESSAGE = 2
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RayConfig:
    """What to run on a Ray cluster.

    Args:
        num_servers: parameter servers; each has a core.
        num_workers: workers; a round waits for all of them.
        max_restarts: how often each server and each worker may be restarted.
        serve: further flags of the servers. Each keeps its shard in a subdirectory of `checkpoint_dir`, which all nodes
            must share; None: nowhere, and a server that dies ends the run.
        directory: where workers start, on their nodes; None: where Ray puts them.
        cpus_per_worker: cores to reserve for a worker.
        gpus_per_worker: GPUs to reserve for a worker, and to make visible to it.
        bind_host: where servers listen; None: at their node's address.
        must_be_new: whether the chief, when it is first started, refuses to go on from a center that is there already.
    """

    num_servers: int
    num_workers: int
    max_restarts: int
    serve: ServeFlags
    directory: str | None
    cpus_per_worker: int
    gpus_per_worker: int
    bind_host: str | None
    must_be_new: bool = False

    def bundles(self) -> list[dict[str, float]]:
        """What to reserve: for each server, then for each worker."""
        worker = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return [
            *({"CPU": 1.0} for _ in range(self.num_servers)),
            *({what: float(count) for what, count in worker.items() if count} for _ in range(self.num_workers)),
        ]


class RayCluster:
    """A `Cluster` on the Ray cluster that this process is connected to; the connection ends with its context.

    Args:
        config: what to run.
        on_message: called with each line that a parameter server logs, after its name, and with news of the cluster.
    """

    def __init__(self, config: RayConfig, on_message: LineHandler) -> None:
        self.num_servers = config.num_servers
        self.num_workers = config.num_workers
        self.addresses: tuple[str, ...] = ()
        directory = config.serve.checkpoint_dir
        names = [] if directory is None else [server_name(index) for index in range(config.num_servers)]
        self.center_at = tuple(directory / name for name in names if directory is not None)
        self._config = config
        self._on_message = on_message
        self._group: PlacementGroup | None = None
        self._servers: list[RayProcess] = []
        self._workers: list[RayProcess] = []
        self._all_listen = asyncio.Event()

    async def __aenter__(self) -> RayCluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Workers first: without servers they would report errors.
            await _stopped(self._workers)
            await _stopped(self._servers)
        finally:
            for process in (*self._workers, *self._servers):
                process.kill()
            if self._group is not None:
                remove_placement_group(self._group)
            ray.shutdown()

    async def start_servers(self) -> None:
        """Returns when all listen: within two minutes, once there is room for the cluster. Errors are `Cluster`'s."""
        await self._reserve()
        self._servers = [self._start_server(index) for index in range(self.num_servers)]
        all_listen = asyncio.ensure_future(self._all_listen.wait())
        changes: list[asyncio.Future[Any]] = [all_listen, *(server.ended for server in self._servers)]
        await asyncio.wait(changes, timeout=_READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        self._check_servers()
        if not all_listen.done():
            all_listen.cancel()
            silent = next(server.name for server in self._servers if not server.listens_at)
            raise EngineError(f"{silent} is not listening after {_READY_TIMEOUT_S:g} s")

    def start_worker(
        self,
        index: int,
        command: Sequence[str],
        on_output: LineHandler,
        on_error: LineHandler,
        events: EventPipe | None = None,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts worker ``index``; see `Cluster`. It keeps its index when it is started again."""
        config = self._config
        name = f"worker-{index}"

        must_be_new = config.must_be_new

        def command_at(_: str) -> Command:
            nonlocal must_be_new
            cluster = ClusterSpec(self.addresses, self.num_workers, index, must_be_new=must_be_new)
            must_be_new = False  # restarted, it finds the center that it has initialized
            # Unbuffered, so that lines appear when they are printed.
            whole = {**environ, **cluster.to_env(), "PYTHONUNBUFFERED": "1"}
            return Command(name, command, whole, config.directory, None if events is None else events.flag)

        handlers = {OUTPUT: on_output, ERROR: on_error} | ({} if events is None else {EVENT: events.on_line})
        host = self._host(self.num_servers + index)
        give_up = f"--max-restarts {config.max_restarts}"
        self._workers.append(RayProcess(name, host, command_at, handlers, config.max_restarts, give_up, self._announce))

    async def workers_done(self) -> None:
        """Returns when every worker has ended well. Errors are `Cluster`'s."""
        running = self._workers
        while running:
            changes = [process.ended for process in (*self._servers, *running)]
            await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
            self._check_servers()
            for worker in running:
                if worker.ended.done():
                    worker.ended.result()
            running = [worker for worker in running if not worker.ended.done()]

    def worker_states(self) -> list[WorkerState]:
        """See `Cluster`."""
        return [WorkerState(worker.name, worker.exit_code, worker.restarts) for worker in self._workers]

    async def _reserve(self) -> None:
        bundles = self._config.bundles()
        self._group = placement_group(bundles, strategy="SPREAD")
        polls = 0
        while not await asyncio.to_thread(self._group.wait, _ROOM_POLL_S):
            polls += 1
            if polls == _POLLS_BEFORE_MESSAGE:
                self._announce(f"waiting until Ray has room: {_room(bundles)}")

    def _start_server(self, index: int) -> RayProcess:
        config = self._config
        name = server_name(index)

        def command_at(bind: str) -> Command:
            arguments = ["-m", "ps_server", "serve", "--bind", bind, "--num-workers", str(self.num_workers)]
            # A Ray cluster needs a trusted network: anyone who can reach its nodes can run code there.
            arguments.append("--insecure")
            directory = self.center_at[index] if self.center_at else None
            arguments += replace(config.serve, checkpoint_dir=directory).to_argv()
            return Command(name, arguments, {}, None, events_flag=None)

        if not self.center_at:
            max_restarts, give_up = 0, "with --checkpoint-dir it would be started again"
        else:
            max_restarts, give_up = config.max_restarts, f"--max-restarts {config.max_restarts}"
        handlers: dict[str, LineHandler] = {
            OUTPUT: lambda line: self._hear_of_server(index, line),
            ERROR: lambda line: self._on_message(f"[{name}] {line}"),
        }
        return RayProcess(
            f"parameter server {name}",
            self._host(index),
            command_at,
            handlers,
            max_restarts,
            give_up,
            self._announce,
        )

    def _hear_of_server(self, index: int, line: str) -> None:
        _, listens, address = line.partition("listening on ")
        if not listens:  # further lines, such as where data connections are accepted
            return
        self._servers[index].listens_at = address
        addresses = tuple(server.listens_at for server in self._servers)
        if not all(addresses):
            return
        before, self.addresses = self.addresses, addresses
        self._all_listen.set()
        if before not in ((), addresses):
            self._announce(f"{self._servers[index].name} has moved to {address}: the workers restart with that address")
            for worker in self._workers:
                worker.run_again()

    def _announce(self, what: str) -> None:
        self._on_message(f"ma-launch: {what}")

    def _check_servers(self) -> None:
        """Raises ProcessFailedError if one has ended, whatever its exit code."""
        for server in self._servers:
            if server.ended.done():
                server.ended.result()
                raise server.failure("ended with exit code 0")

    def _host(self, bundle: int) -> Any:
        """An actor in a bundle of the placement group; Ray recreates it if it dies."""
        assert self._group is not None
        resources = self._config.bundles()[bundle]
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        actor = ray.remote(RayHost).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_restarts=self._config.max_restarts,
            scheduling_strategy=place,
        )
        return actor.remote(self._config.bind_host)


async def _stopped(processes: Sequence[RayProcess]) -> None:
    """Stops them, and waits a limited time for their last lines."""
    for process in processes:
        process.stop()
    if processes:
        await asyncio.wait([process.ended for process in processes], timeout=_STOP_TIMEOUT_S)


def _room(bundles: Sequence[dict[str, float]]) -> str:
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return ", ".join(
        f"{count:g} {what} needed, {free.get(what, 0):g} of {there.get(what, 0):g} free"
        for what, count in needed.items()
    )
