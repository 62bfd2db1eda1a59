"""A server that keeps its center on disk, and one that continues from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import find_latest
from ps_server.rules.policy import RoundPolicy
from tests.checkpoints import (
    durable,
    is_durable,
    small,
    steps,
    write_fresh,
    writers_of,
)
from tests.conftest import StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of
from tests.kept_jobs import job_of, newest, push_all
from tests.raw_client import flat_bytes, rest_of_center, until
from tests.test_server_process import ServerProcess

# A server that keeps its center.


@pytest.fixture
def kept_job(start_server: StartServer, tmp_path: Path) -> Iterator[Job]:
    """The settings of a server that keeps its center in `tmp_path / "center"`, every round."""
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path / "center"))) as job:
        yield job


def test_when_a_call_is_answered_its_center_is_on_disk(kept_job: Job, tmp_path: Path) -> None:
    directory = tmp_path / "center"
    first = newest(directory)
    assert (first.global_step, first.counted) == (STEP, {})
    assert flat_bytes(first.arrays) == flat_bytes(CENTER)
    for step in range(STEP, STEP + 5):
        _, center = push_all(kept_job, step, of(step))
        latest = newest(directory)
        assert latest.global_step == step + 1 == kept_job.client.status().checkpoint_step
        assert flat_bytes(latest.arrays) == center == flat_bytes(of(step))
        assert latest.contributors == ("a", "b")
        assert latest.counted == dict.fromkeys(("a", "b"), (b"0123456789abcdef", step))


def test_every_kth_round_is_kept_and_the_last_when_the_server_stops(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path, every_rounds=3))
    seen = []
    with job_of(server) as job:
        for step in range(STEP, STEP + 7):
            seen.append(newest(tmp_path).global_step)
            until(partial(is_durable, tmp_path, seen[-1]), "it is durable")
            _, center = push_all(job, step, of(step))
        seen.append(newest(tmp_path).global_step)
        until(partial(is_durable, tmp_path, seen[-1]), "it is durable")
    assert seen == [3, 3, 3, 6, 6, 6, 9, 9]
    server.stop()
    assert steps(tmp_path) == [6, 9, 10]
    assert is_durable(tmp_path, 10)
    assert flat_bytes(newest(tmp_path).arrays) == center


def test_a_server_that_stops_twice_at_one_step_keeps_the_steps_before(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with job_of(server) as job:
        push_all(job, STEP, of(1))
        until(lambda: is_durable(tmp_path, STEP + 1), "it is durable")
    server.stop()
    before = steps(tmp_path)
    for _ in range(2):
        start_server(2, checkpoints=CheckpointPolicy(tmp_path)).stop()
    assert steps(tmp_path) == before
    assert before[-1] == STEP + 1


@pytest.fixture
def held_disk() -> Iterator[Callable[[], Callable[[], None]]]:
    """hold() -> go_on: stops the checkpoint writers of this process's servers until go_on() is called."""
    held = list[int]()

    def go_on() -> None:
        while held:
            os.kill(held.pop(), signal.SIGCONT)

    def hold() -> Callable[[], None]:
        held.extend(writers_of(os.getpid()))
        assert held
        for process in held:
            os.kill(process, signal.SIGSTOP)
        return go_on

    yield hold
    go_on()


def test_nobody_hears_of_a_round_before_it_is_on_disk(
    kept_job: Job, held_disk: Callable[[], Callable[[], None]]
) -> None:
    go_on = held_disk()
    client = kept_job.client
    with ThreadPoolExecutor(4) as pool:
        a, b = (kept_job.push(name, of(1), base_step=STEP) for name in ("a", "b"))
        answer = pool.submit(b.answer)
        until(lambda: client.status().HasField("checkpoint_writing_s"), "the checkpoint is being written")
        pull = client.open_pull()
        pull.send(pb.PullRequest(worker_id="meanwhile"))
        pull.half_close()
        assert pull.receive().header.global_step == STEP
        assert rest_of_center(pull) == flat_bytes(CENTER)
        retry = client.open_push()
        retry.send(kept_job.header("a", base_step=STEP, local_step=77))
        retried = pool.submit(retry.answer)
        until(lambda: client.worker("a").local_step == 77, "the retry came")
        assert a.refusal().reason == "PUSH_SUPERSEDED"
        assert client.status().global_step == STEP
        assert not answer.done()
        assert not retried.done()
        go_on()
        assert answer.result(20)[0].outcome == pb.OUTCOME_COMMITTED
        assert retried.result(20)[0].outcome == pb.OUTCOME_COMMITTED
        assert client.status().global_step == STEP + 1
    assert not client.status().HasField("checkpoint_writing_s")


def test_with_a_limit_rounds_go_on_without_a_disk_that_hangs_and_checkpoints_come_back_with_it(
    start_server: StartServer, tmp_path: Path, held_disk: Callable[[], Callable[[], None]]
) -> None:
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path, timeout_s=0.2))) as job:
        go_on = held_disk()
        for number in range(4):  # more rounds than there are buffers: the buffer on its way to the disk stays as it is
            push_all(job, STEP + number, of(10 + number))
        status = job.client.status()
        assert (status.global_step, status.checkpoint_step) == (STEP + 4, STEP)
        assert status.checkpoint_writing_s > 0
        go_on()
        until(lambda: job.client.status().checkpoint_step == STEP + 1, "the first of them came through")
        found, _ = find_latest(tmp_path, STEP + 1)
        assert found is not None
        assert all((array == 10).all() for array in found[1].arrays.values() if array.size)
        push_all(job, STEP + 4, of(20))
        assert job.client.status().checkpoint_step == STEP + 5


def test_a_round_that_waits_for_its_checkpoint_is_timed_out_and_its_pushes_stay(
    start_server: StartServer, tmp_path: Path, held_disk: Callable[[], Callable[[], None]]
) -> None:
    policy = RoundPolicy.strict(2, round_timeout_s=0.3)
    with job_of(start_server(policy, checkpoints=CheckpointPolicy(tmp_path))) as job:
        go_on = held_disk()
        streams = [job.push(name, of(5), base_step=STEP) for name in ("a", "b")]
        for stream in streams:
            refusal = stream.refusal()
            assert refusal.reason == "ROUND_TIMED_OUT"
            assert "for its checkpoint" in refusal.message
        again = [job.client.open_push() for _ in range(2)]
        for name, stream in zip(("a", "b"), again, strict=True):
            stream.send(job.header(name, base_step=STEP))
            assert stream.admission() == COUNT, "nothing is wanted again"
        go_on()
        for stream in again:
            outcome, center = stream.answer()
            assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, STEP + 1)
            assert center == flat_bytes(of(5))


def test_a_round_that_is_not_due_waits_for_no_disk(
    start_server: StartServer, tmp_path: Path, held_disk: Callable[[], Callable[[], None]]
) -> None:
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path, every_rounds=3))) as job:
        go_on = held_disk()
        push_all(job, STEP, of(1))
        push_all(job, STEP + 1, of(2))
        assert not job.client.status().HasField("checkpoint_writing_s")
        go_on()


# A server that continues.


def assert_goes_on(job: Job, step: int, center: bytes) -> None:
    header, pulled = job.client.pull()
    assert (header.global_step, pulled) == (step, center)
    for name in ("a", "b"):
        outcome, answer = job.push(name, of(99), base_step=step - 1, push_id=step - 1).answer()
        assert outcome.outcome == pb.OUTCOME_ALREADY_COUNTED
        assert (outcome.global_step, list(outcome.contributors), answer) == (step, ["a", "b"], center)
    push_all(job, step, of(7))


def test_a_server_goes_on_from_where_another_stopped(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with job_of(server) as job:
        push_all(job, STEP, of(1))
        _, center = push_all(job, STEP + 1, of(2))
    server.stop()
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path))) as job:
        assert_goes_on(job, STEP + 2, center)


def test_a_server_goes_on_from_any_bytes(start_server: StartServer, tmp_path: Path) -> None:
    written = small(seed=5)
    write_fresh(tmp_path, written)
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path))) as job:
        assert job.center() == flat_bytes(written.arrays)


def test_a_server_that_is_killed_loses_no_round_that_it_has_answered(tmp_path: Path) -> None:
    center = b""
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server, job_of(server) as job:
        for step in range(STEP, STEP + 5):
            _, center = push_all(job, step, of(step))
        server.signal(signal.SIGKILL)
        assert server.end()[0] == -signal.SIGKILL
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server, job_of(server) as job:
        assert_goes_on(job, STEP + 5, center)


def test_what_the_chief_said_of_frozen_parameters_is_kept(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(1, checkpoints=CheckpointPolicy(tmp_path))
    with ParameterServerSession([server.address], worker_id="a", is_chief=True) as chief:
        chief.initialize({"w": np.zeros(3)}, frozen_digests=b"digests!")
        assert chief.push_and_average({"w": np.ones(3)}).global_step == 1
    server.stop()
    again = start_server(1, checkpoints=CheckpointPolicy(tmp_path))
    with ParameterServerSession([again.address], worker_id="a") as worker:
        assert worker.frozen_digests == b""
        assert worker.pull()[1] == 1
        assert worker.frozen_digests == b"digests!"


def test_a_center_that_is_restored_is_not_initialized_again(start_server: StartServer, tmp_path: Path) -> None:
    durable(tmp_path, 8)
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path))) as job:
        answer = job.client.initialize(CENTER, 0)
        assert (answer.initialized, answer.global_step) == (False, 8)
        assert job.center() == flat_bytes(small(8).arrays)


def test_a_second_server_on_the_same_directory_is_refused(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as second:
        code, out, err = second.end()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("ps-server: another server")
    assert str(tmp_path) in err
    server.stop()
    start_server(2, checkpoints=CheckpointPolicy(tmp_path))
