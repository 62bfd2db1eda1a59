"""A worker logs each round that has a loss: what the line says, and that nothing about the file stops the training."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from ma_client import DataSettings, ParameterServerSession
from ma_client.files.round_log import ROUND_LOG, LoggedRound, RoundLog
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import RunningServer, StartServer
from tests.raw_client import Arrays, until

MODEL: Arrays = {
    "w": np.random.default_rng(0).normal(size=(500, 700)).astype(np.float32),
    "b": np.zeros(3, np.float16),
}
SMALL: Arrays = {"w": np.zeros(3, np.float32)}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which sessions log their rounds."""
    monkeypatch.setenv(ROUND_LOG, str(tmp_path / "logs"))
    return tmp_path / "logs"


def lines_of(logs: Path, worker: str = "worker-0") -> list[LoggedRound]:
    return [LoggedRound.from_line(line) for line in (logs / f"{worker}.jsonl").read_bytes().splitlines() if line]


def lone_session(start_server: StartServer, stack: ExitStack) -> ParameterServerSession:
    session = ParameterServerSession([start_server(1).address], worker_id="worker-0", is_chief=True)
    stack.enter_context(session)
    session.initialize(SMALL)
    session.pull()
    return session


# What is logged


@pytest.mark.in_memory
def test_each_round_with_a_loss_is_one_line_and_those_without_are_none(start_server: StartServer, logs: Path) -> None:
    with ExitStack() as stack:
        session = lone_session(start_server, stack)
        session.push_and_average(SMALL, local_step=10)
        assert not logs.exists()
        for step in (20, 30):
            session.push_and_average(SMALL, local_step=step, loss=1 / step)
        session.push_and_average(SMALL, local_step=40)
        first, second = lines_of(logs)  # each is there as soon as its round is over
    assert (first.local_step, first.global_step, first.loss) == (20, 2, 0.05)
    assert (second.local_step, second.global_step, second.loss) == (30, 3, 1 / 30)
    assert second.worker == "worker-0"
    assert second.session == first.session
    assert 0 <= first.elapsed_s <= second.elapsed_s
    assert first.unix_time_s <= second.unix_time_s
    size_bytes = SMALL["w"].nbytes
    # The initial values, and a push a round; a pull, and an average a round.
    assert (first.sent_bytes, first.received_bytes) == (3 * size_bytes, 3 * size_bytes)
    assert (second.sent_bytes, second.received_bytes) == (4 * size_bytes, 4 * size_bytes)


@pytest.mark.in_memory
def test_a_round_in_the_background_is_logged_when_it_is_over(start_server: StartServer, logs: Path) -> None:
    with ExitStack() as stack:
        session = lone_session(start_server, stack)
        session.begin_push(SMALL, local_step=5, loss=0.5).result(20)
        (line,) = lines_of(logs)
    assert (line.local_step, line.global_step, line.loss) == (5, 1, 0.5)


@pytest.mark.in_memory
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_in_valid_json(start_server: StartServer, logs: Path, loss: float) -> None:
    with ExitStack() as stack:
        lone_session(start_server, stack).push_and_average(SMALL, loss=loss)

    def refuse(constant: str) -> object:
        raise AssertionError(constant)

    (line,) = (logs / "worker-0.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["loss"] is None


@pytest.mark.in_memory
@pytest.mark.parametrize("overlap_steps", [0, 1])
def test_an_optimizers_loss_is_logged(start_server: StartServer, logs: Path, overlap_steps: int) -> None:
    from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer

    getter = ModelAverageCustomGetter("cpu")
    model = getter(torch.nn.Linear(2, 1))
    local = torch.optim.SGD(model.parameters(), lr=0.1)
    with ParameterServerSession([start_server(1).address], worker_id="worker-0", is_chief=True) as session:
        opt = ModelAverageOptimizer(
            local, 1, True, getter, interval_steps=2, session=session, overlap_steps=overlap_steps
        )
        with opt.make_session_run_hook():
            for step in range(1, 5):
                opt.loss = 1 / step
                opt.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                opt.step()
    assert [(line.local_step, line.loss) for line in lines_of(logs)] == [(2, 0.5), (4, 0.25)]


# Bytes


def play(servers: Sequence[RunningServer], compression: str, shared: bool, least_bytes: int, rounds: int) -> None:
    """A job of two workers."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        sessions = [
            ParameterServerSession(
                [server.address for server in servers],
                worker_id=f"worker-{rank}",
                is_chief=rank == 0,
                shared_memory=shared,
                data_connections=DataSettings(least_bytes=least_bytes, pause_s=0.0),
            )
            for rank in (0, 1)
        ]
        for session in sessions:
            stack.enter_context(session)
        sessions[0].initialize(MODEL, compression=compression)
        for session in sessions:
            session.pull()

        def push(session: ParameterServerSession) -> None:
            session.push_and_average(MODEL, loss=1.0, timeout_s=60)

        def transports() -> set[pb.Transport]:
            return {worker.transport for worker in sessions[0].status().workers}

        list(threads.map(push, sessions))
        wanted = pb.TRANSPORT_SHARED_MEMORY if shared else pb.TRANSPORT_TCP
        if not shared and least_bytes == 0:
            wanted = pb.TRANSPORT_DATA_CONNECTION
            until(lambda: list(threads.map(push, sessions)) != [] and transports() == {wanted}, "both are connected")
        for _ in range(rounds):
            list(threads.map(push, sessions))
        assert transports() == {wanted}


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("compression", ["none", "int8"])
@pytest.mark.parametrize(
    ("shared", "least_bytes"),
    [
        pytest.param(True, 0, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")),
        (False, 0),
        (False, 1 << 40),
    ],
    ids=["shared memory", "data connections", "messages"],
)
def test_what_the_workers_log_is_what_the_servers_have_counted(
    start_server: StartServer, logs: Path, num_servers: int, compression: str, shared: bool, least_bytes: int
) -> None:
    servers = [start_server(2, shared=shared) for _ in range(num_servers)]
    play(servers, compression, shared, least_bytes, rounds=2)
    last = [lines_of(logs, f"worker-{rank}")[-1] for rank in (0, 1)]
    with ParameterServerSession([server.address for server in servers], worker_id="reader") as reader:
        statuses = reader.statuses()
    assert sum(line.sent_bytes for line in last) == sum(status.received_bytes for status in statuses)
    assert sum(line.received_bytes for line in last) == sum(status.sent_bytes for status in statuses)
    assert last[0].sent_bytes > last[1].sent_bytes > MODEL["w"].nbytes / 5  # only the chief has sent initial values


# Trouble with the file


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "ma_client" and record.levelno >= logging.WARNING
    ]


@pytest.mark.in_memory
def test_a_log_that_cannot_be_made_is_said_once_and_training_goes_on(
    start_server: StartServer, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs.write_text("a file")
    with ExitStack() as stack:
        session = lone_session(start_server, stack)
        steps = [session.push_and_average(SMALL, loss=0.5).global_step for _ in range(3)]
    assert steps == [1, 2, 3]
    (said,) = warnings_in(caplog)
    assert said.startswith(f"cannot write the rounds of worker-0 to {logs / 'worker-0.jsonl'} (")
    assert said.endswith("): they will be missing from its curves; training goes on")


@pytest.mark.in_memory
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_said_once_and_training_goes_on(
    start_server: StartServer, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs.mkdir()
    (logs / "worker-0.jsonl").symlink_to("/dev/full")
    with ExitStack() as stack:
        session = lone_session(start_server, stack)
        steps = [session.push_and_average(SMALL, loss=0.5).global_step for _ in range(3)]
    assert steps == [1, 2, 3]
    (said,) = warnings_in(caplog)
    assert "No space left on device" in said


def test_a_line_after_half_a_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"worker": "w", "sess')  # the disk was full, and the worker was killed
    log = RoundLog(tmp_path, "w")
    for step in (1, 2):
        log.note(0.5, step, step, 0.0, 10, 10)
    log.close()
    half, *lines = path.read_text().splitlines()
    with pytest.raises(ValueError, match="Unterminated"):
        LoggedRound.from_line(half)
    assert [LoggedRound.from_line(line).local_step for line in lines] == [1, 2]


def test_a_line_that_was_written_in_part_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = RoundLog(tmp_path, "w"), os.write
    log.note(0.5, 1, 1, 0.0, 10, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))
        log.note(0.5, 2, 2, 0.0, 10, 10)
    log.note(0.5, 3, 3, 0.0, 10, 10)
    log.close()
    first, half, third = (tmp_path / "w.jsonl").read_text().splitlines()
    assert [LoggedRound.from_line(line).local_step for line in (first, third)] == [1, 3]
    assert len(half) == 20


def test_sessions_of_one_worker_are_told_apart(tmp_path: Path) -> None:
    for _ in range(2):
        log = RoundLog(tmp_path, "w")
        log.note(0.5, 1, 1, 0.0, 10, 10)
        log.close()
        log.note(0.5, 2, 2, 0.0, 10, 10)  # after the end nothing is written
    lines = lines_of(tmp_path, "w")
    assert len(lines) == len({line.session for line in lines}) == 2


@pytest.mark.parametrize(
    "change",
    [{"loss": "x"}, {"loss": True}, {"worker": 1}, {"sent_bytes": None}, {"unix_time_s": 10**400}, {"local_step": []}],
)
def test_a_line_with_a_value_of_another_kind_is_refused(change: dict[str, object]) -> None:
    good = json.loads(LoggedRound("w", "s", 1.0, 0.5, 1, 1, 0.5, 10, 10, 0.0).to_line())
    assert LoggedRound.from_line(json.dumps({**good, "of_a_later_version": 1})).loss == 0.5
    with pytest.raises(ValueError, match="not a round"):
        LoggedRound.from_line(json.dumps({**good, **change}))
