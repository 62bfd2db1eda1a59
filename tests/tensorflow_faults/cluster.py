"""A server and its workers as processes, which die by SIGKILL.

A worker trains by adding a number to its local variables; from an average, these numbers tell whose pushes are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from tests.ports import lasting_port
from tests.raw_client import RawClient, until
from tests.worker_process import (
    START_TIMEOUT_S,
    Model,
    Process,
    Pushed,
    TorchWorkerProcess,
    WorkerError,
    WorkerProcess,
    ramp,
)

W = TypeVar("W", bound=WorkerProcess)

# 46 fragments of 64 bytes; most of them hold parts of one variable, some of two.
SHAPES = {f"layer{number}.weight": (13, 9) for number in range(6)} | {"bias": (13,), "scale": ()}
FRAGMENT_SIZE_BYTES = 64
# Initial values of the workers, and what each adds in a step: multiples of 6, so that averages are whole numbers.
INITIAL = (1.0, 100.0, 200.0)
ADDED = (6.0, 12.0, 24.0)
OF_0_AND_1, OF_ALL = 9.0, 14.0
# The initial value of a restarted worker. It must never appear in a center.
INITIAL_OF_RESTARTED = 7000.0


def value_of(model: Model) -> float:
    """The number that every variable is a ramp of."""
    value = float(model["scale"])
    for name, expected in ramp(value, SHAPES).items():
        assert np.array_equal(model[name], expected), f"{name} is {model[name]}, but scale is {value}"
    assert model.keys() == SHAPES.keys()
    return value


def name_of(index: int) -> str:
    return f"worker-{index}"


class ServerProcess(Process):
    """`ps-server serve`, which listens."""

    def __init__(self, *arguments: str, bind: str) -> None:
        super().__init__("ps_server", "serve", "--bind", bind, *arguments)
        self.arguments = arguments
        self.address = self.line(START_TIMEOUT_S).split()[-1]


class Pool:
    """Workers' processes. A process that has survived a test and waits for a command is used in the next one."""

    def __init__(self) -> None:
        self._idle: dict[type[WorkerProcess], list[WorkerProcess]] = {WorkerProcess: [], TorchWorkerProcess: []}

    def take(self, kind: type[W], spare: int = 0) -> W:
        """Gives a process, and keeps ``spare`` more starting."""
        idle = cast("list[W]", self._idle[kind])
        worker = idle.pop() if idle else kind()
        while len(idle) < spare:
            idle.append(kind())
        return worker

    def put_back(self, worker: WorkerProcess) -> None:
        if worker.idle:
            worker.ask("close")
            worker.forget_errors()
            self._idle[type(worker)].append(worker)
        else:
            worker.kill()

    def close(self) -> None:
        for workers in self._idle.values():
            for worker in workers:
                worker.kill()


class Cluster:
    """A server and its workers."""

    def __init__(self, stack: ExitStack, pool: Pool) -> None:
        self._stack = stack
        self._pool = pool
        self._processes = list[Process]()
        self.server: ServerProcess
        self.client: RawClient

    def serve(self, num_workers: int, *arguments: str) -> None:
        """Starts the server."""
        self._listens(ServerProcess("--num-workers", str(num_workers), *arguments, bind=f"127.0.0.1:{lasting_port()}"))

    def serve_again(self) -> None:
        """Restarts the server at its address after it was killed."""
        self._listens(ServerProcess(*self.server.arguments, bind=self.server.address))

    def _listens(self, server: ServerProcess) -> None:
        self._stack.callback(server.kill)
        self._processes.append(server)
        self.server = server
        self.client = self._stack.enter_context(RawClient(server.address))

    def workers(self, kind: type[W], settings: Sequence[Mapping[str, Any]], spare: int = 0) -> list[W]:
        """Workers that have joined."""
        workers = [self._pool.take(kind, spare) for _ in settings]
        for worker in workers:
            self._stack.callback(self._pool.put_back, worker)
            self._processes.append(worker)
        for worker in workers:
            worker.get_ready()
        for worker, own in zip(workers, settings, strict=True):
            worker.send("join", address=self.server.address, **own)
        for worker in workers:
            worker.answer()
        return workers

    def join(self, *indexes: int, initial: Sequence[float] = INITIAL, **options: Any) -> list[WorkerProcess]:
        """Workers with different initial values. Worker 0 is the chief."""
        common = {"shapes": SHAPES, "fragment_size_bytes": FRAGMENT_SIZE_BYTES}
        own = [{"worker_id": name_of(i), "is_chief": i == 0, "initial": initial[i]} for i in indexes]
        return self.workers(WorkerProcess, [{**common, **settings, **options} for settings in own], spare=2)

    def start(self, count: int, **options: Any) -> list[WorkerProcess]:
        """This many workers, which have pulled the chief's center."""
        workers = self.join(*range(count), **options)
        start_all(workers)
        return workers

    def restart(self, index: int, **options: Any) -> tuple[WorkerProcess, float, int]:
        """A new process that replaces a killed worker, and what it pulled: the center and its step."""
        (worker,) = self.join(index, initial=[INITIAL_OF_RESTARTED] * 3, **options)
        center, step = worker.start()
        return worker, value_of(center), step

    def waits(self, *indexes: int) -> None:
        """Waits until these workers' pushes are whole."""
        until(lambda: all(self.client.worker(name_of(index)).waiting for index in indexes), f"{indexes} wait")

    def given(self, index: int, count: int) -> None:
        """Waits until a worker has delivered this many fragments."""
        worker_id = name_of(index)
        until(lambda: self.client.worker(worker_id).fragments_given == count, f"{worker_id} gave {count} fragments")

    def check_no_traceback(self) -> None:
        """Checks that nothing unexpected has happened in any process."""
        for process in self._processes:
            assert "Traceback" not in process.errors, process.errors


def start_all(workers: Sequence[WorkerProcess]) -> None:
    for worker in workers:
        worker.send("start")
    for worker in workers:
        worker.answer()


def push_all(workers: Sequence[WorkerProcess]) -> list[Pushed]:
    """Lets all push at once; worker i adds ADDED[i]."""
    for worker, added in zip(workers, ADDED, strict=False):
        worker.begin_push(added)
    return [worker.pushed() for worker in workers]


def round_of(workers: Sequence[WorkerProcess]) -> tuple[float, int]:
    """Makes one round in which all are counted; returns the center and its step."""
    return common(push_all(workers), range(len(workers)))


def common(pushes: Sequence[Pushed], contributors: Sequence[int]) -> tuple[float, int]:
    """The center and its step; checks that all these pushes got the same, made by these workers."""
    first, *_ = pushes
    for pushed in pushes:
        assert pushed.contributors == [name_of(index) for index in contributors]
        assert (value_of(pushed.center), pushed.global_step) == (value_of(first.center), first.global_step)
    return value_of(first.center), first.global_step


def mismatch(worker: WorkerProcess, command: str) -> str:
    """The message with which the command is refused."""
    with pytest.raises(WorkerError) as refused:
        worker.ask(command)
    assert (refused.value.kind, refused.value.reason) == ("ConflictError", "MANIFEST_MISMATCH")
    return str(refused.value)


def refused_as_ahead(worker: WorkerProcess) -> str:
    """The server's words to a worker whose push is from the future."""
    with pytest.raises(
        WorkerError, match="restored from an older checkpoint or initialized again; pull the center"
    ) as refused:
        worker.pushed()
    assert (refused.value.kind, refused.value.reason) == ("ConflictError", "BASE_STEP_AHEAD")
    return str(refused.value)
