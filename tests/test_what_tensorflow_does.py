"""Where TensorFlow's ModelAverageOptimizer hangs, counts twice or starts over, and what this one does instead.

Server and workers are processes, and die by SIGKILL. A worker trains by adding a number to its local variables; from an
average, these numbers tell whose pushes are in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.long_plays import long_except
from tests.ports import lasting_port
from tests.raw_client import RawClient, until
from tests.worker_process import (
    START_TIMEOUT_S,
    TIMEOUT_S,
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


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def cluster(pool: Pool) -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(stack, pool)
        yield cluster
        cluster.check_no_traceback()


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


# Different initial values.


def test_workers_with_different_initial_values_all_start_from_the_chiefs(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.join(0, 1, 2)
    for worker in workers[1:]:
        worker.send("start")
    until(lambda: len(cluster.client.status().workers) == 2, "two wait for the chief")
    center, step = workers[0].start()
    assert (value_of(center), step) == (INITIAL[0], 0)
    for worker in workers[1:]:
        worker.answer()
    assert [value_of(worker.local()) for worker in workers] == [INITIAL[0]] * 3
    assert round_of(workers) == (INITIAL[0] + OF_ALL, 1)


# A worker is killed before the barrier.


def test_a_worker_killed_before_the_barrier_is_waited_for_by_name_until_it_comes_back(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    workers[2].kill()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    cluster.waits(0, 1)
    status = cluster.client.status()
    assert (status.phase, status.global_step) == (pb.PHASE_AVERAGING, 1)
    assert (list(status.waiting_for), status.waiting_for_unknown) == (["worker-2"], 0)
    shown = subprocess.run(
        [sys.executable, "-m", "ps_server", "status", cluster.server.address],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "\nwaiting for  worker-2 (for " in shown.stdout
    known = r"'worker-2' \(last heard from \d+ s ago\)$"
    assert re.search(rf"round 1 has waited [5-9] s for {known}", cluster.server.logged("has waited"))
    for worker in workers[:2]:
        assert re.match(rf"the round has waited [5-9] s for {known}", worker.logged("has waited"))
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (15, 1)
    workers[2].begin_push(ADDED[2])
    assert common([worker.pushed() for worker in workers], range(3)) == (15 + OF_ALL, 2)


GRACE_S = 1.5


@pytest.mark.parametrize("fragments", long_except([20], [0, 20]))
def test_with_a_quorum_a_killed_worker_costs_one_grace_period(cluster: Cluster, fragments: int) -> None:
    cluster.serve(3, "--min-workers", "2", "--grace-s", str(GRACE_S))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    if fragments:
        workers[2].begin_push(ADDED[2], hold_after=fragments)
        cluster.given(2, fragments)
    workers[2].kill()

    began_at_s = time.monotonic()
    assert common(push_all(workers[:2]), range(2)) == (15 + OF_0_AND_1, 2)
    assert GRACE_S <= time.monotonic() - began_at_s < GRACE_S + 2

    began_at_s = time.monotonic()
    assert common(push_all(workers[:2]), range(2)) == (24 + OF_0_AND_1, 3)
    assert time.monotonic() - began_at_s < GRACE_S
    status = cluster.client.status()
    assert (status.rounds_without_all, status.rounds_restarted) == (2, 1 if fragments else 0)

    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (33, 3)
    workers[2].begin_push(ADDED[2])
    cluster.waits(2)
    for worker, added in zip(workers[:2], ADDED, strict=False):
        worker.begin_push(added)
    assert common([worker.pushed() for worker in workers], range(3)) == (33 + OF_ALL, 4)


def test_with_a_quorum_a_worker_that_closes_its_session_costs_nothing(cluster: Cluster) -> None:
    grace_s = 10.0
    cluster.serve(3, "--min-workers", "2", "--grace-s", str(grace_s))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    began_at_s = time.monotonic()
    workers[2].ask("close")
    assert workers[2].end() == 0
    assert common(push_all(workers[:2]), range(2)) == (15 + OF_0_AND_1, 2)
    assert time.monotonic() - began_at_s < grace_s

    # It comes back, and goes while the others wait for it.
    workers[2], *_ = cluster.restart(2)
    workers[2].begin_push(ADDED[2])
    cluster.waits(2)
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    assert common([worker.pushed() for worker in workers], range(3)) == (24 + OF_ALL, 3)
    began_at_s = time.monotonic()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    cluster.waits(0, 1)
    assert list(cluster.client.status().waiting_for) == ["worker-2"]
    workers[2].ask("close")
    assert common([worker.pushed() for worker in workers[:2]], range(2)) == (38 + OF_0_AND_1, 4)
    assert time.monotonic() - began_at_s < grace_s


# It restarts.


def test_a_worker_that_restarts_goes_on_from_the_center_and_not_from_its_initial_values(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[1].kill()
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    (workers[1],) = cluster.join(1, initial=[INITIAL_OF_RESTARTED] * 2)
    assert value_of(workers[1].local()) == INITIAL_OF_RESTARTED
    with pytest.raises(WorkerError, match="pull the center") as refused:
        workers[1].push()
    assert (refused.value.kind, refused.value.reason) == ("NotInitializedError", "NOT_INITIALIZED")
    assert cluster.client.worker("worker-1").fragments_given == 0
    center, step = workers[1].start()
    assert (value_of(center), step) == (10, 1)
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (10 + OF_0_AND_1, 2)


# It had pushed, dies, restarts and pushes again.


def test_a_worker_that_had_pushed_dies_and_pushes_again_is_counted_once(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    workers[0].begin_push(ADDED[0])
    workers[2].begin_push(ADDED[2])
    cluster.waits(0, 2)
    workers[2].kill()
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (1, 0)
    for _ in range(3):
        workers[2].ask("train", by=600)
    workers[2].begin_push()
    until(lambda: cluster.client.worker("worker-2").local_step == 3, "the second push is there")
    status = cluster.client.status()
    assert (status.global_step, list(status.waiting_for)) == (0, ["worker-1"])
    workers[1].begin_push(ADDED[1])
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(3)) == (1 + OF_ALL, 1)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED", "COMMITTED", "ALREADY_COUNTED"]
    assert [worker.pushes_counted for worker in cluster.client.status().workers] == [1, 1, 1]
    assert round_of(workers) == (15 + OF_ALL, 2)


def test_of_a_worker_that_dies_in_the_middle_of_its_push_only_the_next_whole_push_counts(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    workers[2].begin_push(600, hold_after=20)
    cluster.given(2, 20)
    workers[2].kill()
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (1, 0)
    workers[2].begin_push(ADDED[2])
    cluster.waits(0, 2)
    workers[1].begin_push(ADDED[1])
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(3)) == (1 + OF_ALL, 1)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 3
    assert cluster.client.status().rounds_restarted == 1


# It had pushed and died, the round committed, it restarts.


def test_a_worker_that_died_after_its_push_joins_the_round_in_progress(cluster: Cluster) -> None:
    cluster.serve(3)
    workers, expected = cluster.start(3), INITIAL[0]
    for dies, (waits, comes_last) in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        # The round that it has pushed to commits without it.
        workers[dies].begin_push(ADDED[dies])
        cluster.waits(dies)
        workers[dies].kill()
        for index in (waits, comes_last):
            workers[index].begin_push(ADDED[index])
        pushes = [workers[index].pushed() for index in (waits, comes_last)]
        step = pushes[0].global_step
        expected += OF_ALL
        assert common(pushes, range(3)) == (expected, step)
        # The next round is in progress when it comes back.
        workers[waits].begin_push(ADDED[waits])
        cluster.waits(waits)
        workers[dies], *pulled = cluster.restart(dies)
        assert pulled == [expected, step]
        workers[dies].begin_push(ADDED[dies])
        cluster.waits(dies)
        assert cluster.client.status().global_step == step
        workers[comes_last].begin_push(ADDED[comes_last])
        pushes = [worker.pushed() for worker in workers]
        expected += OF_ALL
        assert common(pushes, range(3)) == (expected, step + 1)
        assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 3
    assert cluster.client.status().global_step == 6


# The chief is killed.


@pytest.mark.parametrize("is_chief", long_except([True], [True, False]))
def test_a_killed_chief_joins_again_like_any_worker(cluster: Cluster, is_chief: bool) -> None:
    cluster.serve(2)
    workers = cluster.start(2, initial_step=5)
    assert round_of(workers) == (10, 6)
    workers[0].kill()
    workers[1].begin_push(ADDED[1])
    cluster.waits(1)
    assert list(cluster.client.status().waiting_for) == ["worker-0"]
    workers[0], center, step = cluster.restart(0, is_chief=is_chief)
    assert (center, step) == (10, 6)
    workers[0].begin_push(ADDED[0])
    assert common([worker.pushed() for worker in workers], range(2)) == (10 + OF_0_AND_1, 7)
    assert round_of(workers) == (19 + OF_0_AND_1, 8)


# The server is killed.


def test_a_killed_server_comes_back_with_its_center_and_the_round_completes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.serve(2, "--checkpoint-dir", str(tmp_path))
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    cluster.server.kill()
    workers[1].begin_push(ADDED[1])
    for worker in workers:
        assert "trying again for up to 60 s" in worker.logged(cluster.server.address)
    cluster.serve_again()
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(2)) == (10 + OF_0_AND_1, 2)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 2
    assert "global_step 1" in cluster.server.logged("continuing from checkpoint")

    # Server and chief die together.
    for process in (cluster.server, workers[0]):
        process.kill()
    cluster.serve_again()
    workers[0], center, step = cluster.restart(0)
    assert (center, step) == (19, 2)
    assert round_of(workers) == (19 + OF_0_AND_1, 3)


def test_a_server_that_lost_its_center_is_an_error_and_never_a_start_from_initial_values(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    cluster.server.kill()
    cluster.serve_again()
    workers[1].begin_push(ADDED[1])
    for worker, added in zip(workers, ADDED, strict=False):
        with pytest.raises(WorkerError, match=r"has lost the center variables .* --checkpoint-dir") as lost:
            worker.pushed()
        assert (lost.value.kind, lost.value.reason) == ("NotInitializedError", "NOT_INITIALIZED")
        assert value_of(worker.local()) == 10 + added
    assert cluster.client.status().phase == pb.PHASE_UNINITIALIZED

    # A restarted chief begins a new job. Workers of the old job are told so, in any order of arrival.
    workers[0].kill()
    workers[0], center, step = cluster.restart(0)
    assert (center, step) == (INITIAL_OF_RESTARTED, 0)
    workers[1].begin_push()
    cluster.waits(1)
    workers[0].begin_push(ADDED[0])
    refused_as_ahead(workers[1])
    cluster.waits(0)
    workers[1].begin_push()
    refused_as_ahead(workers[1])
    assert value_of(workers[1].local()) == 10 + ADDED[1]
    assert cluster.client.status().global_step == 0


def refused_as_ahead(worker: WorkerProcess) -> str:
    """The server's words to a worker whose push is from the future."""
    with pytest.raises(
        WorkerError, match="restored from an older checkpoint or initialized again; pull the center"
    ) as refused:
        worker.pushed()
    assert (refused.value.kind, refused.value.reason) == ("ConflictError", "BASE_STEP_AHEAD")
    return str(refused.value)


# global_step.


def test_global_step_counts_committed_rounds_only(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2, initial_step=5)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    assert cluster.client.status().global_step == 5
    # All but one fragment is there when the round starts over.
    workers[1].begin_push(600, hold_after=45)
    cluster.given(1, 45)
    assert cluster.client.status().global_step == cluster.client.pull()[0].global_step == 5
    workers[1].kill()
    workers[1], *pulled = cluster.restart(1)
    assert pulled == [1, 5]
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (1 + OF_0_AND_1, 6)
    assert cluster.client.status().global_step == 6
    assert cluster.client.pull()[0].global_step == 6


# Pushes from the past and from the future.


def test_a_stale_push_gets_the_center_and_leaves_the_round_whole(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(3)
    assert round_of(workers[:2]) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    stale = workers[2].push(600)
    assert (stale.outcome, stale.global_step, value_of(stale.center)) == ("STALE", 1, 10)
    status = cluster.client.status()
    assert (status.stale_pushes, status.rounds_restarted, status.global_step) == (1, 0, 1)
    assert [worker.waiting for worker in status.workers] == [True, False, False]
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers[:2]], range(2)) == (10 + OF_0_AND_1, 2)

    # It goes on from the center that it got: stale again, and then no longer.
    assert value_of(workers[2].local()) == 10
    again = workers[2].push(600)
    assert (again.outcome, value_of(again.center)) == ("STALE", 19)
    workers[2].begin_push(ADDED[2])
    workers[0].begin_push(ADDED[0])
    pushes = [workers[index].pushed() for index in (0, 2)]
    assert common(pushes, (0, 2)) == (19 + (ADDED[0] + ADDED[2]) / 2, 3)


def restored_from_an_older_checkpoint(cluster: Cluster, directory: Path) -> list[WorkerProcess]:
    """Workers at step 3, where the center is 28; a server at step 2, where it is 19."""
    cluster.serve(2, "--checkpoint-dir", str(directory), "--checkpoint-every-rounds", "2")
    workers = cluster.start(2)
    assert [round_of(workers) for _ in range(3)] == [(10, 1), (19, 2), (28, 3)]
    until(lambda: cluster.client.status().checkpoint_step == 2, "there is a checkpoint")
    cluster.server.kill()
    cluster.serve_again()
    assert cluster.client.status().global_step == 2
    return workers


def test_pushes_from_the_future_are_adopted_when_all_agree(cluster: Cluster, tmp_path: Path) -> None:
    workers = restored_from_an_older_checkpoint(cluster, tmp_path)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    assert cluster.client.status().global_step == 2
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (28 + OF_0_AND_1, 4)
    assert round_of(workers) == (37 + OF_0_AND_1, 5)


@pytest.mark.parametrize("comes_first", long_except([True], [True, False]))
def test_a_lone_push_from_the_future_is_refused(cluster: Cluster, tmp_path: Path, comes_first: bool) -> None:
    ahead, other = restored_from_an_older_checkpoint(cluster, tmp_path)
    other.kill()
    other, *pulled = cluster.restart(1)
    assert pulled == [19, 2]
    if comes_first:
        ahead.begin_push(600)
        cluster.waits(0)
        other.begin_push(ADDED[1])
        told = refused_as_ahead(ahead)
        assert told.startswith("others push from base step 3, 'worker-1' from 2, but the server is at global_step 2")
    else:
        other.begin_push(ADDED[1])
        cluster.waits(1)
        ahead.begin_push(600)
        told = refused_as_ahead(ahead)
        assert told.startswith("'worker-0' pushes from base step 3, but the server is at global_step 2")
    assert value_of(ahead.local()) == 28 + 600
    cluster.waits(1)
    center, step = ahead.start()
    assert (value_of(center), step) == (19, 2)
    ahead.begin_push(ADDED[0])
    assert common([ahead.pushed(), other.pushed()], range(2)) == (19 + OF_0_AND_1, 3)


# A round that takes too long.


def test_a_round_that_takes_too_long_is_an_error_that_names_the_missing_and_may_go_on(cluster: Cluster) -> None:
    timeout_s = 1.5
    cluster.serve(3, "--round-timeout-s", str(timeout_s))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    began_at_s = time.monotonic()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    for index in (0, 1):
        with pytest.raises(WorkerError) as late:
            workers[index].pushed()
        assert (late.value.kind, late.value.reason) == ("DeadlineExceededError", "ROUND_TIMED_OUT")
        assert str(late.value).startswith("round 1 waited 1.5 s (--round-timeout-s) for 'worker-2'; ")
        assert timeout_s <= time.monotonic() - began_at_s < timeout_s + 2
        assert value_of(workers[index].local()) == 15 + ADDED[index]
    assert cluster.client.status().global_step == 1
    workers[2].begin_push(ADDED[2])
    workers[1].begin_push()
    workers[0].begin_push()
    assert common([worker.pushed() for worker in workers], range(3)) == (15 + OF_ALL, 2)
    assert [worker.pushes_counted for worker in cluster.client.status().workers] == [2, 2, 2]


# Shapes that differ.


def test_shapes_that_differ_are_named_in_one_line_and_hold_nobody_up(cluster: Cluster) -> None:
    other = {**SHAPES, "layer3.weight": (9, 13)}
    cluster.serve(2)
    workers = cluster.start(2)
    (late,) = cluster.join(1, shapes=other)
    assert mismatch(late, "start") == (
        "variable 'layer3.weight' is float32[9, 13] here but float32[13, 9] in the center; "
        "give all workers the same model"
    )
    (chief,) = cluster.join(0, shapes=other)
    assert mismatch(chief, "start") == (
        "the center was initialized with another manifest: "
        "variable 'layer3.weight' is float32[9, 13] in the call but float32[13, 9] on the server; "
        "give all workers the same model"
    )
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    workers[1].ask("reshape", name="layer3.weight", shape=(117,))
    assert mismatch(workers[1], "push") == (
        "variable 'layer3.weight' is float32[117] here but float32[13, 9] in the center; "
        "give all workers the same model"
    )
    (workers[1],) = cluster.join(1)
    workers[1].start()
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (1 + OF_0_AND_1, 1)


def mismatch(worker: WorkerProcess, command: str) -> str:
    """The message with which the command is refused."""
    with pytest.raises(WorkerError) as refused:
        worker.ask(command)
    assert (refused.value.kind, refused.value.reason) == ("ConflictError", "MANIFEST_MISMATCH")
    return str(refused.value)


# Gradients and optimizers: models of torch's.


Values = Mapping[str, list[float]]
START: Values = {"w": [1.0, 2.0, 3.0], "b": [4.0, 5.0]}


def optimizing(cluster: Cluster, *options: Mapping[str, Any]) -> list[TorchWorkerProcess]:
    """Workers with a model and an optimizer. Worker 0 is the chief."""
    common = {"initial": START, "num_worker": 2}
    return cluster.workers(
        TorchWorkerProcess,
        [{**common, "worker_id": name_of(i), "is_chief": i == 0, **own} for i, own in enumerate(options)],
    )


def step_all(workers: Sequence[WorkerProcess], *gradients: Values) -> None:
    for worker, own in zip(workers, gradients, strict=True):
        worker.send("step", **own)
    for worker in workers:
        worker.answer()


def test_a_gradient_of_none_on_one_worker_only_is_pushed_like_the_others(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = optimizing(cluster, {}, {"initial": {"w": [9.0] * 3, "b": [9.0] * 2}})
    start_all(workers)
    assert [worker.ask("state")["values"] for worker in workers] == [START, START]
    step_all(workers, {"w": [1.0, 1.0, 1.0], "b": [2.0, 2.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        state = worker.ask("state")
        assert (state["values"], state["global_step"]) == ({"w": [-1.0, 0.0, 1.0], "b": [3.0, 4.0]}, 1)
    step_all(workers, {"b": [2.0, 2.0]}, {"w": [4.0, 4.0, 4.0]})
    for worker in workers:
        state = worker.ask("state")
        assert (state["values"], state["global_step"]) == ({"w": [-3.0, -2.0, -1.0], "b": [2.0, 3.0]}, 2)


def test_a_gradient_of_none_on_all_workers_leaves_the_variable_alone(cluster: Cluster) -> None:
    cluster.serve(2)
    largest = float(np.finfo(np.float32).max)  # the sum of two is infinite
    workers = optimizing(cluster, {"initial": {**START, "b": [largest, 5.0]}}, {})
    start_all(workers)
    step_all(workers, {"w": [1.0, 1.0, 1.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        assert worker.ask("state")["values"] == {"w": [-1.0, 0.0, 1.0], "b": [largest, 5.0]}
    # But a changed variable is averaged: unlike the original, this optimizer compares the bytes.
    for worker, value in zip(workers, (10.0, 20.0), strict=True):
        worker.ask("assign", b=[value, value])
    step_all(workers, {"w": [1.0, 1.0, 1.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        assert worker.ask("state")["values"] == {"w": [-3.0, -2.0, -1.0], "b": [15.0, 15.0]}
    assert np.frombuffer(cluster.client.pull()[1], np.float32).tolist()[-2:] == [15.0, 15.0]
    assert cluster.client.status().global_step == 2


OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.1}}
SLOTS = {"SGD": ["momentum_buffer"], "Adam": ["exp_avg", "exp_avg_sq", "step"]}


class Reference:
    """torch's own optimizer, without a wrapper."""

    def __init__(self, optimizer: str) -> None:
        self.parameters = {name: torch.nn.Parameter(torch.tensor(values)) for name, values in START.items()}
        self._opt = getattr(torch.optim, optimizer)(self.parameters.values(), **OPTIMIZERS[optimizer])

    def step(self, gradients: Values) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        self._opt.step()

    def values(self) -> Values:
        return {name: parameter.tolist() for name, parameter in self.parameters.items()}

    def slots(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {
            name: {slot: self._opt.state[parameter][slot].tolist() for slot in names}
            for name, parameter in self.parameters.items()
        }


@torch.no_grad()
def average(one: Reference, other: Reference) -> None:
    for ours, theirs in zip(one.parameters.values(), other.parameters.values(), strict=True):
        ours.copy_((ours + theirs) / 2)
        theirs.copy_(ours)


def gradients_of(worker: int, local_step: int) -> Values:
    """Gradients that differ for every worker and step."""
    chance = np.random.default_rng((worker, local_step))
    return {name: chance.random(len(values), np.float32).tolist() for name, values in START.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_slots_and_local_step_stay_local_and_are_kept_across_rounds(cluster: Cluster, optimizer: str) -> None:
    intervals, rounds = (1, 3), 3
    cluster.serve(2)
    settings = {"optimizer": optimizer, "settings": OPTIMIZERS[optimizer]}
    workers = optimizing(cluster, *({**settings, "interval_steps": interval} for interval in intervals))
    start_all(workers)
    references = [Reference(optimizer), Reference(optimizer)]
    for round_ in range(rounds):
        for index, (worker, reference, interval) in enumerate(zip(workers, references, intervals, strict=True)):
            for step in range(round_ * interval, (round_ + 1) * interval):
                reference.step(gradients_of(index, step))
                worker.send("step", **gradients_of(index, step))
                if step + 1 < (round_ + 1) * interval:
                    worker.answer()
        for worker in workers:
            worker.answer()
        average(*references)
        states = [worker.ask("state") for worker in workers]
        for state, reference, interval in zip(states, references, intervals, strict=True):
            assert state["values"] == reference.values()
            assert state["slots"] == reference.slots(SLOTS[optimizer])
            assert (state["local_step"], state["global_step"]) == ((round_ + 1) * interval, round_ + 1)
        assert states[0]["slots"] != states[1]["slots"]


def test_shapes_that_differ_are_named_at_the_start_of_an_optimizer(cluster: Cluster) -> None:
    cluster.serve(2)
    chief, other = optimizing(cluster, {}, {"initial": {**START, "b": [1.0, 2.0, 3.0]}})
    chief.ask("start")
    assert mismatch(other, "start") == (
        "variable 'b' is float32[3] here but float32[2] in the center; give all workers the same model"
    )


def test_a_restarted_optimizer_goes_on_from_the_center(cluster: Cluster) -> None:
    cluster.serve(2)
    (killed,) = optimizing(cluster, {})
    (other,) = cluster.join(1, shapes={name: (len(values),) for name, values in START.items()})
    start_all([killed, other])
    killed.send("step", w=[1.0, 1.0, 1.0])
    other.push(6)
    killed.answer()
    center = {"w": [3.5, 7.5, 11.5], "b": [7.0, 11.0]}
    assert killed.ask("state")["values"] == center
    killed.kill()
    other.begin_push(6)
    cluster.waits(1)
    (restarted,) = optimizing(cluster, {"initial": {"w": [9.0] * 3, "b": [9.0] * 2}})
    restarted.ask("start")
    state = restarted.ask("state")
    assert (state["values"], state["global_step"], state["local_step"]) == (center, 1, 0)
    restarted.ask("step", b=[2.0, 4.0])
    state = restarted.ask("state")
    assert (state["values"], state["global_step"]) == ({"w": [6.5, 13.5, 20.5], "b": [9.0, 15.0]}, 2)
    assert other.pushed().global_step == 2
