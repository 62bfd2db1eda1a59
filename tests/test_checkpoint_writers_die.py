"""The checkpoint writers are processes: one that dies costs no checkpoint, and all end with their server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ps_server.checkpoints import writer_process
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.unusable import UnusableSettingError
from tests.checkpoints import (
    is_durable,
    opened_keeper,
    small,
    steps,
    writers_of,
)
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.keeper_plays import play, said, soon, state_of, stopped
from tests.raw_client import RawClient, until
from tests.test_server_process import ServerProcess


def test_a_writer_that_dies_between_two_checkpoints_costs_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        before = writers_of(os.getpid())
        assert len(before) == 2
        for process in before:
            os.kill(process, signal.SIGKILL)
        await soon(lambda: not any(map(state_of, before)))
        await keeper.write(small(2))
        await keeper.finish(20)
        assert (keeper.step, keeper.problem) == (2, "")
        assert len(writers_of(os.getpid())) == 2

    play(body, CheckpointPolicy(tmp_path))
    assert said(caplog) == ["checkpoint_writer_ended"] * 2
    assert "was ended by signal 9" in caplog.messages[0]
    assert is_durable(tmp_path, 2)


def test_a_writer_that_dies_in_the_middle_is_a_problem_that_the_next_checkpoint_solves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        processes = writers_of(os.getpid())
        with stopped(processes):
            writing = asyncio.ensure_future(keeper.write(small(2)))
            await soon(lambda: keeper.writing_since_s is not None)
            for process in processes:
                os.kill(process, signal.SIGKILL)
            await writing
        await soon(lambda: not any(map(state_of, processes)))
        assert keeper.problem.startswith(f"no checkpoint in {tmp_path}: the checkpoint writer ")
        assert "was ended by signal 9" in keeper.problem
        await keeper.write(small(3))
        await keeper.finish(20)
        assert (keeper.step, keeper.problem) == (3, "")

    play(body, CheckpointPolicy(tmp_path))
    assert said(caplog)[0] == "checkpoint_failed"
    assert steps(tmp_path) == [1, 3]


def test_writers_end_with_their_server_even_if_they_stand_still(tmp_path: Path) -> None:
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server:
        writers = writers_of(server.pid)
        assert len(writers) == 2
        os.kill(writers[0], signal.SIGSTOP)
        server.signal(signal.SIGKILL)
        server.end()
        until(lambda: not any(map(state_of, writers)), "the writers are gone")


def test_signals_to_all_processes_end_the_server_as_one_to_the_server_alone(tmp_path: Path) -> None:
    flags = ("--checkpoint-dir", str(tmp_path), "--checkpoint-every-rounds", "1000")
    with ServerProcess(*flags) as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        streams = [job.push(name, of(1), base_step=STEP) for name in ("a", "b")]
        for stream in streams:
            stream.answer()
        for process in [*writers_of(server.pid), server.pid]:  # as a Ctrl-C, or the end of a service
            os.kill(process, signal.SIGINT)
        code, _, log = server.end()
    assert (code, log) == (0, "")
    assert is_durable(tmp_path, STEP + 1)


def test_writers_have_nothing_of_the_server_but_their_channel(start_server: StartServer, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        start_server(2, checkpoints=CheckpointPolicy(tmp_path / "center"))
        writers = writers_of(os.getpid())
        assert len(writers) == 2
        for process in writers:
            opened = {entry.name: os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()}
            assert opened.pop("0").startswith("socket:")
            assert opened == {"1": "/dev/null", "2": "/dev/null"}


def test_a_writer_loads_neither_grpc_nor_numpy() -> None:
    code = "import ps_server.checkpoints.writer, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"grpc", "google", "numpy", "asyncio", "logging"}.isdisjoint(loaded.stdout.split())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/nowhere/python"], "No such file or directory"),
        ([sys.executable, "-c", "import sys; sys.exit(3)"], "ended"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "signal 9"),
    ],
)
def test_a_server_that_cannot_start_its_writers_says_so_and_does_not_start(
    command: list[str], why: str, start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer_process, "command", lambda _: command)
        with pytest.raises(UnusableSettingError, match=f"--checkpoint-dir .* the checkpoint writer .*{why}"):
            start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    start_server(2, checkpoints=CheckpointPolicy(tmp_path))  # nothing is left that keeps it out


def test_a_server_without_threads_for_its_writers_says_so_and_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "checkpoint-flush":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)

    async def open_one() -> None:
        with pytest.raises(RuntimeError, match="new thread"), opened_keeper(CheckpointPolicy(tmp_path)):
            pass

    asyncio.run(open_one())
    until(lambda: not writers_of(os.getpid()), "nothing runs on")
