"""Finishing, from the session to the log: rounds continue without finished workers, and only without these."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession
from ma_client.job.results import PushResult
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP, Job, of, running
from tests.raw_client import (
    RawClient,
    flat_bytes,
    fragments_of,
    initialize_header,
    manifest_of,
    rest_of_center,
    until,
)
from tests.test_server_process import ServerProcess

Model = dict[str, np.ndarray[Any, Any]]


def model(value: float = 0.0) -> Model:
    return {"w": np.full(6, value, np.float32)}


class Workers:
    """Sessions of a job, which push at the same time."""

    def __init__(self, addresses: list[str], count: int) -> None:
        self._stack = ExitStack()
        self.sessions = [
            self._stack.enter_context(ParameterServerSession(addresses, worker_id=f"worker-{n}", is_chief=n == 0))
            for n in range(count)
        ]
        self._threads = self._stack.enter_context(ThreadPoolExecutor(count))
        self.sessions[0].initialize(model())
        for session in self.sessions:
            session.pull()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, index: int, value: float) -> Future[PushResult]:
        session = self.sessions[index]
        return self._threads.submit(lambda: session.push_and_average(model(value), timeout_s=20))


@contextmanager
def workers(start_server: StartServer, count: int, servers: int = 1, **options: Any) -> Iterator[Workers]:
    addresses = [start_server(count, **options).address for _ in range(servers)]
    with Workers(addresses, count) as found:
        yield found


@pytest.mark.parametrize("servers", [1, 2])
def test_rounds_go_on_without_a_worker_that_has_finished(start_server: StartServer, servers: int) -> None:
    with workers(start_server, 3, servers) as found:
        first = [found.begin(index, index) for index in range(3)]
        assert [result.result().center["w"][0] for result in first] == [1, 1, 1]
        assert found.sessions[2].finish() == 2
        second = [found.begin(index, 2 + index) for index in range(2)]
        assert [result.result().contributors for result in second] == [("worker-0", "worker-1")] * 2
        assert found.sessions[1].finish() == 1
        assert found.begin(0, 7.0).result().center["w"][0] == 7
        assert found.sessions[0].finish() == 0
        assert all(status.job_over for status in found.sessions[0].statuses())


def test_a_worker_at_the_barrier_goes_on_when_the_last_missing_worker_finishes(start_server: StartServer) -> None:
    with workers(start_server, 2) as found:
        waiting = found.begin(0, 5.0)
        until(lambda: found.sessions[1].status().phase == pb.PHASE_AVERAGING, "the push came")
        assert found.sessions[1].finish() == 1
        assert waiting.result().contributors == ("worker-0",)


def test_a_finished_worker_can_wait_for_the_last_center_of_the_job(start_server: StartServer) -> None:
    with workers(start_server, 2, servers=2) as found:
        first = found.sessions[1]
        first.finish()
        assert not first.wait_for_others(timeout_s=0.01)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(first.wait_for_others, 20.0)
            assert found.begin(0, 8.0).result().contributors == ("worker-0",)
            assert not waiting.done()
            found.sessions[0].finish()
            assert waiting.result()
        assert first.pull()[0]["w"][0] == 8


def test_a_later_pull_brings_no_finished_worker_back_but_training_again_does(
    start_server: StartServer,
) -> None:
    with workers(start_server, 2) as found:
        found.sessions[1].finish()
        found.sessions[1].pull()
        assert found.sessions[0].status().workers_finished == 1
        found.sessions[1].resume_training()
        found.sessions[1].pull()
        assert found.sessions[0].status().workers_finished == 0
        waiting = found.begin(0, 4.0)
        assert found.begin(1, 2.0).result().contributors == ("worker-0", "worker-1")
        assert waiting.result().center["w"][0] == 3


def test_a_new_process_of_a_worker_that_had_finished_counts_from_its_pull_on(start_server: StartServer) -> None:
    with workers(start_server, 2) as found:
        found.sessions[1].finish()
        address = found.sessions[0].ps_hosts[0]
        with ParameterServerSession([address], worker_id="worker-1") as another:
            another.pull(catch_up=False)  # a reader
            assert found.sessions[0].status().workers_finished == 1
            another.pull()
            assert found.sessions[0].status().workers_finished == 0


def test_a_run_after_the_end_of_a_job_begins_with_its_center(start_server: StartServer) -> None:
    address = start_server(2).address
    with Workers([address], 2) as found:
        results = [found.begin(index, 4 * index) for index in range(2)]
        assert [result.result().global_step for result in results] == [1, 1]
        assert [session.finish() for session in found.sessions] == [1, 0]
    with Workers([address], 2) as found:
        assert [session.base_step for session in found.sessions] == [1, 1]
        assert found.sessions[0].pull()[0]["w"][0] == 2
        waiting = found.begin(0, 1.0)
        until(lambda: found.sessions[1].status().phase == pb.PHASE_AVERAGING, "the push came")
        assert not waiting.done()
        assert found.begin(1, 3.0).result().contributors == ("worker-0", "worker-1")
        assert waiting.result().center["w"][0] == 2


def test_a_killed_server_that_comes_back_knows_who_has_finished(tmp_path: Path) -> None:
    flags = ("--checkpoint-dir", str(tmp_path), "--checkpoint-every-rounds", "100")
    with ServerProcess(*flags, num_workers=2) as server:
        with Workers([server.address], 2) as found:
            results = [found.begin(index, 4 * index) for index in range(2)]
            assert [result.result().global_step for result in results] == [1, 1]
            assert found.sessions[1].finish() == 1
        server.signal(signal.SIGKILL)
        server.end()
    with ServerProcess(*flags, num_workers=2) as server, RawClient(server.address) as client:
        status = client.status()
        assert (status.global_step, status.workers_finished) == (1, 1)
        with ParameterServerSession([server.address], worker_id="worker-0") as session:
            session.pull()
            assert session.push_and_average(model(9.0), timeout_s=20).contributors == ("worker-0",)


def test_the_log_and_the_status_say_who_has_finished_who_has_left_and_when_the_job_is_over(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ps_server")
    with running(start_server) as job:
        for name in ("worker-0", "worker-1"):
            job.push(name, of(1))
        until(lambda: job.client.status().global_step == STEP + 1, "the round commits")
        leave(job, "worker-0")
        until(lambda: job.client.worker("worker-0").has_left, "the goodbye came")
        assert "'worker-0' has left without having finished; rounds wait for it" in caplog.messages
        assert leave(job, "worker-1", finished=True) == pb.LeaveResponse(workers_training=1, global_step=STEP + 1)
        assert f"'worker-1' has finished at global_step {STEP + 1}; rounds go on with 1" in caplog.messages
        assert job.client.worker("worker-1").has_finished
        assert not job.client.status().job_over
        assert leave(job, "worker-0", finished=True) == pb.LeaveResponse(workers_training=0, global_step=STEP + 1)
        assert "all workers have finished: the job is over" in caplog.messages[-1]
        assert job.client.status().job_over
        assert not job.client.worker("worker-0").has_left
        job.push("worker-0", of(2), base_step=STEP + 1, push_id=2)
        until(lambda: not job.client.status().job_over, "a new run has begun")
        assert "'worker-0' trains again; rounds go on with 2" in caplog.messages


def leave(job: Job, worker_id: str, finished: bool = False) -> pb.LeaveResponse:
    stream = job.client.open_leave()
    stream.send(pb.LeaveRequest(worker_id=worker_id, incarnation=b"0123456789abcdef", finished=finished))
    stream.half_close()
    return stream.receive()


def test_a_strict_round_says_of_those_it_waits_for_that_they_have_left_or_when_they_were_heard_of(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with running(start_server, 4, first_notice_s=0.05) as job:
        for name in "abcd":
            job.push(name, of(1))
        until(lambda: job.client.status().global_step == STEP + 1, "the round commits")
        leave(job, "c")
        leave(job, "d", finished=True)
        stream = job.push("a", of(2), base_step=STEP + 1, push_id=2)
        while not (message := stream.receive()).HasField("waiting"):
            pass
        notice = message.waiting
        assert (list(notice.waiting_for), list(notice.finished), notice.workers_training) == (["b", "c"], ["d"], 3)
        assert [missing.has_left for missing in notice.missing] == [False, True]
        assert 0 < notice.missing[0].last_seen_age_s < 20
        assert any("'c' (has left)" in line for line in caplog.messages)


def test_the_server_says_that_it_waits_for_the_chief(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with RawClient(start_server(2, first_notice_s=0.1).address) as client:
        stream = client.open_pull()
        stream.send(pb.PullRequest(worker_id="worker-1", wait_initialized=True))
        until(lambda: sum("there is no center yet" in line for line in caplog.messages) >= 3, "the log says so")
        assert "no chief (worker 0) has come to initialize it" in caplog.messages[-1]
        assert "waiting with it: 'worker-1'" in caplog.messages[-1]
        chief = client.open_initialize()
        chief.send(initialize_header(manifest_of(CENTER)))
        until(lambda: any("'chief' is sending it" in line for line in caplog.messages), "the log names the chief")
        chief.give(fragments_of(CENTER))
        chief.half_close()
        assert stream.receive().HasField("header")


def test_a_pull_that_waits_for_the_chief_is_sent_something_if_it_wants_to(
    start_server: StartServer,
) -> None:
    with RawClient(start_server(2, first_notice_s=0.05).address) as client:
        told, untold = client.open_pull(), client.open_pull()
        told.send(pb.PullRequest(worker_id="a", wait_initialized=True, accepts_notices=True))
        untold.send(pb.PullRequest(worker_id="b", wait_initialized=True))
        notices = [told.receive() for _ in range(3)]
        assert all(notice.HasField("waiting") for notice in notices)
        assert sorted(notice.waiting.waited_s for notice in notices) == [n.waiting.waited_s for n in notices]
        client.initialize(CENTER)
        assert untold.receive().HasField("header")
        while (message := told.receive()).HasField("waiting"):
            pass
        assert message.HasField("header")
        assert rest_of_center(told) == flat_bytes(CENTER)


def test_a_pull_goes_on_where_it_broke_if_the_center_is_still_the_same(job: Job) -> None:
    fragments = fragments_of(CENTER)
    for step, first in ((STEP, 2), (STEP - 1, 0), (STEP + 1, 0)):
        stream = job.client.open_pull()
        stream.send(pb.PullRequest(worker_id="a", first_fragment=2, continued_step=step))
        assert stream.receive().header.global_step == STEP
        for index in range(first, len(fragments)):
            assert stream.receive().fragment == pb.Fragment(index=index, data=fragments[index])
        assert stream.ended()


def test_different_intervals_are_said_once_and_shown(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ps_server")
    for step in (STEP, STEP + 1):
        for name, interval in (("a", 100), ("b", 50)):
            job.push(name, of(1), base_step=step, push_id=step, interval_steps=interval)
        until(lambda step=step: job.client.status().global_step == step + 1, "the round commits")  # type: ignore[misc]
    said = [line for line in caplog.messages if "interval_steps differ" in line]
    assert len(said) == 1
    assert said[0].startswith("interval_steps differ: 'b' 50; 'a' 100;")
    assert [worker.interval_steps for worker in job.client.status().workers if worker.interval_steps] == [100, 50]


def test_values_that_are_not_finite_are_said_once_an_episode_by_the_server_and_by_the_worker(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    address = start_server(RoundPolicy.strict(1)).address
    with ParameterServerSession([address], worker_id="w", is_chief=True) as session:
        session.initialize(model())
        session.pull()
        for value in (np.nan, np.inf, 1.0, np.nan):
            session.push_and_average(model(value), timeout_s=20)
    for name in ("ps_server", "ma_client"):
        said = [record.getMessage() for record in caplog.records if record.name == name]
        assert len([line for line in said if "not finite" in line]) == 2, name
