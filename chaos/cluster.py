"""One server and its workers, supervised and struck by faults, until the workers have made the planned rounds."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from chaos.faults import Fault
from chaos.forks import fork, serve, serve_small
from chaos.limits import limits
from chaos.log import Values, flat, newest_checkpoint, newest_step
from chaos.seats import Seat
from chaos.visitors import Visitors
from chaos.worker import FRAGMENT_SIZE_BYTES, NO_COMPRESSION, WAYS, Task, work
from ma_client import ClusterSpec, ParameterServerSession
from modelaverage.manifest import Manifest, Variable, dtype_name
from modelaverage.outer import AVERAGE, OuterOptimizer

__all__ = ["Course", "Plan", "SERVER", "run", "workers_of"]

SERVER = "server"
_CHECKPOINTS = "checkpoints"
_TICK_S = 0.01
_PROGRESS_EVERY_S = 2.0
# After this time without a round, the faults end. This distinguishes a job that hangs from one with too many faults.
_CALM_AFTER_S = 30.0
_GIVE_UP_AFTER_S = 90.0


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        workers: how many; the server is strict.
        rounds: until this `global_step`.
        directory: where the log, the checkpoints and what the processes print will lie.
        squeezes: whether the server is made to run out of descriptors and threads, too.
        outer: the outer optimizer that the chief names.
        compression: the codec that it names; with one, each worker uses another transport.
    """

    workers: int
    rounds: int
    directory: Path
    squeezes: bool = False
    outer: OuterOptimizer = AVERAGE
    compression: str = NO_COMPRESSION


@dataclass(frozen=True)
class Course:
    """How a run went.

    Args:
        began_at_s: when all processes had been started, on the monotonic clock.
        ended_at_s: when the last worker was done.
        starts: of each process, by name.
        struck: the faults, with the times at which they happened.
        deaths: processes that ended, but not by a fault.
        squeezed_deaths: processes that ended on their own because they lacked something, which is allowed.
        lacks_limit: which limit this machine cannot set, and why; empty if it can set all, or none was needed.
        rounds_started_over: how often the server started a round over because a push broke off.
        center: the server's center at the end; None if the run was given up.
        manifest: the center's; None if the run was given up.
        global_step: the center's.
        gave_up: why the run was given up; empty if it was not.
    """

    began_at_s: float
    ended_at_s: float
    starts: dict[str, int]
    struck: tuple[Fault, ...]
    deaths: tuple[str, ...]
    squeezed_deaths: tuple[str, ...]
    lacks_limit: str
    rounds_started_over: int
    center: Values | None
    manifest: Manifest | None
    global_step: int
    gave_up: str


def workers_of(count: int) -> list[str]:
    """The workers' ids."""
    return [f"worker-{index}" for index in range(count)]


def run(plan: Plan, faults: Iterator[Fault], on_progress: Callable[[int, int], None]) -> Course:
    """Runs the plan to its end. Whatever happens, no process is left behind.

    Args:
        plan: what to run.
        faults: what happens, by time from the start.
        on_progress: gets the global_step and how many faults there have been, every two seconds.
    """
    plan.directory.mkdir(parents=True)
    cluster = _Cluster(plan)
    try:
        return cluster.run(faults, on_progress)
    finally:
        cluster.end()


class _Cluster:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        server_limits, self._lacks_limit = limits(SERVER) if plan.squeezes else ({}, "")
        self._server = Seat(SERVER, self._start_server, finishes=False, limits=server_limits)
        self._workers = [
            Seat(name, partial(self._start_worker, index), finishes=True)
            for index, name in enumerate(workers_of(plan.workers))
        ]
        self._visitors = Visitors(self._address) if plan.squeezes else None
        self._seats = {seat.name: seat for seat in (self._server, *self._workers)}

    def run(self, faults: Iterator[Fault], on_progress: Callable[[int, int], None]) -> Course:
        began_at_s = now_s = newer_at_s = told_at_s = time.monotonic()
        step, gave_up, struck = -1, "", list[Fault]()
        fault = next(faults, None)
        while not (gave_up or all(worker.done for worker in self._workers)):
            time.sleep(_TICK_S)
            now_s = time.monotonic()
            for seat in self._seats.values():
                seat.tend(now_s)
                struck += [replace(each, at_s=now_s - began_at_s) for each in seat.news()]
            calm = now_s - newer_at_s > _CALM_AFTER_S
            while fault is not None and now_s - began_at_s >= fault.at_s:
                if not calm and self._may_strike(fault, now_s):
                    self._seats[fault.process].strike(fault, now_s)
                fault = next(faults, None)
            if now_s - told_at_s >= _PROGRESS_EVERY_S:
                newest, told_at_s = newest_step(self._plan.directory), now_s
                on_progress(newest, len(struck))
                if newest > step:
                    step, newer_at_s = newest, now_s
                if now_s - newer_at_s > _GIVE_UP_AFTER_S:
                    gave_up = f"no round for {now_s - newer_at_s:.0f} s; the server says:\n{self._status()}"
        self._server.spare()  # the last fault may have struck it
        center, manifest, step = (None, None, step) if gave_up else self._pull()
        log = self._words(SERVER).read_text()
        return Course(
            began_at_s,
            now_s,
            {seat.name: seat.starts for seat in self._seats.values()},
            tuple(struck),
            tuple(death for seat in self._seats.values() for death in seat.deaths),
            tuple(death for seat in self._seats.values() for death in seat.squeezed_deaths),
            self._lacks_limit,
            log.count("starts over"),
            center,
            manifest,
            step,
            gave_up,
        )

    def _may_strike(self, fault: Fault, now_s: float) -> bool:
        """A server that could not write a checkpoint still answers, and says that a kill would lose rounds."""
        if (fault.process, fault.kind) != (SERVER, "kill") or not self._plan.squeezes:
            return True
        kept = newest_checkpoint(self._plan.directory / _CHECKPOINTS)
        return not self._server.is_squeezed(now_s) and kept >= newest_step(self._plan.directory)

    def end(self) -> None:
        if self._visitors is not None:
            self._visitors.end()
        for seat in self._seats.values():
            seat.end()

    def _start_server(self, _: int) -> BaseProcess:
        arguments = ["serve", "--bind", self._address, "--num-workers", str(self._plan.workers)]
        arguments += ["--checkpoint-dir", str(self._plan.directory / _CHECKPOINTS)]
        return fork(self._words(SERVER), serve_small if self._plan.squeezes else serve, arguments)

    def _start_worker(self, index: int, number: int) -> BaseProcess:
        cluster = ClusterSpec((self._address,), self._plan.workers, index)
        # Shared memory and connections need descriptors, too, and carry codecs in their own way.
        plan = self._plan
        way = WAYS[index % len(WAYS)] if plan.squeezes or plan.compression != NO_COMPRESSION else None
        task = Task(cluster, number, plan.rounds, plan.directory, way, plan.outer, plan.compression)
        return fork(self._words(cluster.worker_id), work, task)

    def _words(self, name: str) -> Path:
        return self._plan.directory / f"{name}.log"

    def _pull(self) -> tuple[Values, Manifest, int]:
        with ParameterServerSession([self._address], worker_id="chaos") as session:
            center, step = session.pull(timeout_s=_CALM_AFTER_S, catch_up=False)  # it only asks for the status
        variables = tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in center.items())
        return flat(center), Manifest(variables, FRAGMENT_SIZE_BYTES), step

    def _status(self) -> str:
        command = [sys.executable, "-m", "ps_server", "status", self._address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
