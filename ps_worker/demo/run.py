"""A run of the built-in workload: a cluster, then what it is compared with, then the report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from safetensors.numpy import save_file

from ma_client import ParameterServerSession
from modelaverage.chosen import NO_COMPRESSION
from modelaverage.errors import ModelAverageError
from modelaverage.missing import Missing
from modelaverage.outer import AVERAGE, text_of
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.curves.metrics import curves_of
from ps_worker.curves.run_directory import new_run_directory
from ps_worker.demo import run_files
from ps_worker.demo.digits_config import ALONE, ALONE_WITH_ALL, PLAIN, DigitsConfig
from ps_worker.demo.metrics_file import MetricsFile
from ps_worker.demo.record import Record
from ps_worker.demo.summary import Summary
from ps_worker.demo.view import Cast, View, view_for
from ps_worker.engines.engine import Cluster, Engine, server_name
from ps_worker.engines.processes import Child, EventPipe, LineHandler, Processes, all_end_well
from ps_worker.events.parse import EVENTS_FLAG, Event, ServerEvent, decode, encode
from ps_worker.watch.beside import beside
from ps_worker.watch.lookout import keep_looking
from ps_worker.watch.server_watch import ServerWatch

__all__ = ["DemoConfig", "run_demo"]

_STATUS_INTERVAL_S = 0.25
_SAVE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DemoConfig:
    """What to run.

    Args:
        training: how the workers train, and the lone processes that they are compared with.
        runs: where to make the run's directory.
    """

    training: DigitsConfig
    runs: Path


async def run_demo(config: DemoConfig, engine: Engine, processes: Processes) -> None:
    """Runs the workload, shows it, and writes its files. The lone processes and the report run as local ``processes``.

    Raises:
        ProcessFailedError: a worker, a server or the report failed.
        EngineError: the servers did not start.
        ModelAverageError: a server did not answer at the end.
        OSError: the files cannot be written.
    """
    view = view_for(Console())
    directory = new_run_directory(config.runs)
    try:
        with MetricsFile(directory / run_files.METRICS, view.say) as metrics:
            async with engine(processes, view.say) as cluster:
                demo = _Demo(config, cluster, processes, directory, view, metrics)
                summary = await demo.run()
    finally:
        view.close()
        run_files.remove_if_empty(directory)
    curves = curves_of(event for events in demo.record.steps.values() for event in events)
    view.plot([curve for curve in curves if curve.has_server])
    view.table(
        "Handwritten digits: accuracy and loss on the test images",
        [*summary.rows(), ("files", ", ".join(summary.files))],
    )
    view.say(f"written to {directory}{os.sep}")


class _Demo:
    """One run: its stages in order, and what is shown of them.

    Attributes:
        record: what has happened so far.
    """

    def __init__(
        self,
        config: DemoConfig,
        cluster: Cluster,
        processes: Processes,
        directory: Path,
        view: View,
        metrics: MetricsFile,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._processes = processes
        self._directory = directory
        self._view = view
        self._metrics = metrics
        self.record = Record()
        count = cluster.num_servers
        self._stage = "the parameter server starts" if count == 1 else f"{count} parameter servers start"
        self._next_stage = ""
        lone = [ALONE]
        if config.training.outer != text_of(AVERAGE) or config.training.compression != NO_COMPRESSION:
            lone.insert(0, PLAIN)
        if cluster.num_workers > 1:  # with one worker, its share is all images
            lone.append(ALONE_WITH_ALL)
        self._alone = tuple(lone)
        self._workers = tuple(f"worker-{index}" for index in range(cluster.num_workers))

    async def run(self) -> Summary:
        """Runs all stages."""
        started_at_s = time.monotonic()
        async with beside(self._keep_showing()):
            await self._cluster.start_servers()
            servers, cluster_s = await self._train_together()
            alone_s = await self._train_alone()
            await self._draw()
        summary = self._summary(servers, time.monotonic() - started_at_s, cluster_s, alone_s)
        summary.write(self._directory / run_files.SUMMARY)
        return summary

    async def _train_together(self) -> tuple[list[ServerEvent], float]:
        """Returns the servers' last state, and the seconds from the workers' start to their end."""
        started_at_s = time.monotonic()
        together = f"{len(self._workers)} workers train together" if len(self._workers) > 1 else "1 worker trains"
        self._enter(f"{together}: importing torch", together)
        for index, worker in enumerate(self._workers):
            say = self._say(worker)
            self._cluster.start_worker(index, self._worker_command(), say, say, EventPipe(EVENTS_FLAG, self._heard))
        watch = ServerWatch()
        try:
            async with (
                beside(self._keep_watching(watch)),
                beside(keep_looking(self._cluster, watch, self._view.say)),
            ):
                await self._cluster.workers_done()
            cluster_s = time.monotonic() - started_at_s
            servers = [_sample(name, await watch.status(address)) for name, address in self._servers().items()]
        finally:
            watch.close()
        for server in servers:
            self._add(server)
        await asyncio.to_thread(self._save_center)
        return servers, cluster_s

    def _save_center(self) -> None:
        # Saved here and not by the chief, which may be on a machine without this directory.
        with ParameterServerSession(
            self._cluster.addresses, worker_id="ma-launch", connect_timeout_s=_SAVE_TIMEOUT_S, reconnect_timeout_s=0
        ) as session:
            center, _ = session.pull(timeout_s=_SAVE_TIMEOUT_S, catch_up=False)
        save_file(dict(center), self._directory / run_files.CENTER)

    async def _train_alone(self) -> float:
        started_at_s = time.monotonic()
        lone = f"for comparison: {', '.join(self._alone)}"
        self._enter(f"{lone}: importing torch", lone)
        # All at the same time, on one core each.
        await all_end_well([self._start_alone(name) for name in self._alone])
        return time.monotonic() - started_at_s

    def _start_alone(self, name: str) -> Child:
        command = [sys.executable, *self._worker_command(), "--alone", f"--num-workers={len(self._workers)}"]
        command += {ALONE_WITH_ALL: ["--all-images"], PLAIN: ["--plain-averages"]}.get(name, [])
        say = self._say(name)
        return self._processes.start(
            f"{name} worker", command, os.environ, say, say, EventPipe(EVENTS_FLAG, self._heard)
        )

    async def _draw(self) -> None:
        self._enter("the report is written: importing matplotlib")
        command = [sys.executable, "-m", "ps_worker.report", str(self._directory)]
        say = self._say("report")
        await all_end_well([self._processes.start("the report", command, os.environ, say, say)])

    def _worker_command(self) -> list[str]:
        return ["-m", "ps_worker", "digits", *self._config.training.to_argv()]

    def _summary(self, servers: list[ServerEvent], total_s: float, cluster_s: float, alone_s: float) -> Summary:
        center, alone = self.record.last_score(self._workers[0]), self.record.last_score(ALONE)
        assert center is not None
        assert alone is not None
        received_bytes = sum(server.received_bytes for server in servers)
        sent_bytes = sum(server.sent_bytes for server in servers)
        return Summary(
            center=center,
            plain=self.record.last_score(PLAIN),
            alone=alone,
            all_images=self.record.last_score(ALONE_WITH_ALL),
            rounds=min(server.global_step for server in servers),
            bytes_moved=received_bytes + sent_bytes,
            bytes_received=received_bytes,
            bytes_sent=sent_bytes,
            bytes_received_raw=sum(server.received_raw_bytes for server in servers),
            bytes_sent_raw=sum(server.sent_raw_bytes for server in servers),
            total_s=total_s,
            cluster_s=cluster_s,
            alone_s=alone_s,
            waited_s={worker: sum(r.waited_s for r in self.record.rounds[worker]) for worker in self._workers},
            num_servers=len(servers),
            num_workers=len(self._workers),
            restarts={w.name: w.restarts for w in self._cluster.worker_states() if w.restarts},
            config=self._config.training,
            files=run_files.ALL,
        )

    def _say(self, name: str) -> LineHandler:
        return lambda line: self._view.say(f"[{name}] {line}")

    def _enter(self, stage: str, after_first_event: str = "") -> None:
        """Sets the current stage, and the stage that begins with the first event of a worker."""
        self._stage, self._next_stage = stage, after_first_event

    def _heard(self, line: str) -> None:
        self._stage, self._next_stage = self._next_stage or self._stage, ""
        self._add(decode(line))

    def _add(self, event: Event) -> None:
        self.record.add(event)
        self._metrics.write(encode(event))

    async def _keep_watching(self, watch: ServerWatch) -> None:
        while True:
            for name, address in self._servers().items():
                # If the server has ended, its exit ends the run; if it is slow, it may answer next time.
                with contextlib.suppress(ModelAverageError):
                    self._add(_sample(name, await watch.status(address)))
            await asyncio.sleep(_STATUS_INTERVAL_S)

    async def _keep_showing(self) -> None:
        try:
            while True:
                self._show()
                await asyncio.sleep(self._view.refresh_interval_s)
        finally:
            self._show()

    def _show(self) -> None:
        cast = Cast(self._servers(), self._workers, self._alone, self._config.training.steps)
        self._view.show(cast, self.record, self._stage)

    def _servers(self) -> dict[str, str]:
        """Addresses by server name; empty until the servers listen."""
        return {server_name(index): address for index, address in enumerate(self._cluster.addresses)}


def _sample(server: str, status: pb.GetStatusResponse) -> ServerEvent:
    """What a server was doing when it answered."""
    missing = Missing.told(status)
    return ServerEvent(
        server=server,
        unix_time_s=time.time(),
        phase=pb.Phase.Name(status.phase).removeprefix("PHASE_").lower(),
        global_step=status.global_step,
        received_bytes=status.received_bytes,
        sent_bytes=status.sent_bytes,
        waiting_for=missing.names,
        waiting_for_omitted=missing.omitted,
        received_raw_bytes=status.received_raw_bytes,
        sent_raw_bytes=status.sent_raw_bytes,
    )
