"""A disk that holds the checkpoint writers: it is said, and neither rounds nor the server's end wait for ever."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.checkpoints import keeper as keeping
from ps_server.checkpoints import writer_process
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import load_latest
from tests.checkpoints import (
    faulty_writer,
    is_durable,
    small,
    steps,
    writers_of,
)
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.keeper_plays import play, said, soon, state_of, stopped
from tests.raw_client import RawClient, until
from tests.scraped import scrape
from tests.test_server_process import ServerProcess


def test_a_write_that_hangs_is_said_again_and_again_and_when_it_came_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeping, "_WRITE_PATIENCE_S", 0.1)

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        assert keeper.writing_since_s is None
        with stopped(writers_of(os.getpid())):
            writing = asyncio.ensure_future(keeper.write(small(2)))
            await soon(lambda: said(caplog) == ["checkpoint_hangs"] * 3)
            assert keeper.problem.startswith(f"the checkpoint of global_step 2 has been waiting for {tmp_path} for ")
            assert keeper.writing_since_s is not None
            assert not writing.done()
            assert keeper.step == 1
        await writing
        assert (keeper.problem, keeper.step) == ("", 2)
        assert keeper.writing_since_s is None
        await keeper.finish(20)

    play(body, CheckpointPolicy(tmp_path))
    assert said(caplog) == [*["checkpoint_hangs"] * 3, "checkpoint_written_late"]
    fields = [record.modelaverage_fields for record in caplog.records]  # type: ignore[attr-defined]
    assert all((each["path"], each["round"]) == (str(tmp_path), 2) for each in fields)
    waited_s = [each["waited_s"] for each in fields]
    assert waited_s == sorted(waited_s)
    assert waited_s[1] >= 0.3  # 0.1, then 0.2 more, then 0.4
    assert waited_s[2] >= 0.7
    assert steps(tmp_path) == [1, 2]


def test_a_checkpoint_that_does_not_become_durable_is_said_too_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeping, "_FLUSH_PATIENCE_S", 0.1)
    go_on = tmp_path / "go on"
    slow = f"""
now = files.make_durable
def slow(*arguments):
    while not os.path.exists({str(go_on)!r}):
        time.sleep(0.005)
    return now(*arguments)
files.make_durable = slow"""
    monkeypatch.setattr(writer_process, "command", faulty_writer(slow))

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await soon(lambda: "checkpoint_hangs" in said(caplog))
        assert keeper.problem.startswith("the durable checkpoint of global_step 1 has been waiting for ")
        assert keeper.writing_since_s is None
        await keeper.write(small(2))
        assert keeper.step == 2
        go_on.touch()
        await keeper.finish(20)
        assert keeper.problem == ""

    play(body, CheckpointPolicy(tmp_path))
    assert said(caplog)[-1] == "checkpoint_written_late"
    assert is_durable(tmp_path, 2)


def test_a_keeper_that_finishes_waits_for_a_hanging_disk_no_longer_than_told_and_says_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(keeper: Keeper) -> None:
        with stopped(writers_of(os.getpid())):
            writing = asyncio.ensure_future(keeper.write(small(1)))
            await soon(lambda: keeper.writing_since_s is not None)
            began_s = time.monotonic()
            await keeper.finish(0.2)
            keeper.close()
            assert 0.2 <= time.monotonic() - began_s < 10
            await writing  # its process was killed
            assert keeper.problem

    play(body, CheckpointPolicy(tmp_path))
    assert said(caplog)[0] == "checkpoint_given_up"
    assert "the checkpoint of global_step 1" in caplog.messages[0]
    assert steps(tmp_path) == []


def test_two_writes_come_one_after_the_other(tmp_path: Path) -> None:
    async def body(keeper: Keeper) -> None:
        with stopped(writers_of(os.getpid())):
            writes = [asyncio.ensure_future(keeper.write(small(step))) for step in (1, 2)]
            await soon(lambda: keeper.writing_since_s is not None)
        await asyncio.gather(*writes)
        assert (keeper.step, keeper.problem) == (2, "")
        await keeper.finish(20)

    play(body, CheckpointPolicy(tmp_path))
    assert is_durable(tmp_path, 2)


def test_status_and_metrics_say_since_when_a_disk_hangs(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_WRITE_PATIENCE_S", 0.1)
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path), metrics_bind="127.0.0.1:0")
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        assert not client.status().HasField("checkpoint_writing_s")
        assert scrape(server.metrics_address)["checkpoint_writing_seconds"] == 0
        with stopped(writers_of(os.getpid())):
            streams = [job.push(name, of(1), base_step=STEP) for name in ("a", "b")]
            until(lambda: client.status().checkpoint_problem != "", "the status reports it")
            status = client.status()
            expected = f"the checkpoint of global_step {STEP + 1} has been waiting for {tmp_path} for "
            assert status.checkpoint_problem.startswith(expected)
            assert status.checkpoint_writing_s >= 0.1
            assert status.checkpoint_step == STEP
            assert scrape(server.metrics_address)["checkpoint_writing_seconds"] >= 0.1
        for stream in streams:
            assert stream.answer()[0].outcome == pb.OUTCOME_COMMITTED
        assert client.status().checkpoint_problem == ""


def test_how_long_a_round_waits_for_its_checkpoint_is_a_positive_number_of_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit, match="2"):
            main(["serve", "--num-workers", "1", "--checkpoint-timeout-s", word])
        assert "--checkpoint-timeout-s" in capsys.readouterr().err


def test_a_server_ends_on_time_though_the_disk_hangs(tmp_path: Path) -> None:
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        with stopped(writers_of(server.pid)):
            streams = [job.push(name, of(1), base_step=STEP) for name in ("a", "b")]
            until(lambda: client.status().HasField("checkpoint_writing_s"), "the checkpoint is being written")
            began_s = time.monotonic()
            server.signal(signal.SIGTERM)
            code, _, log = server.end()
            assert code == 0
            assert time.monotonic() - began_s < 8
            for stream in streams:
                stream.refusal()
    assert f"the checkpoint of global_step {STEP + 1} has been waiting for {tmp_path}" in log
    assert "Traceback" not in log


@pytest.fixture
def frozen_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A separate disk, and a function that freezes (-f) and thaws (-u) it."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("mkfs.ext4", "mount", "fsfreeze")):
        pytest.skip("needs root, mkfs.ext4, mount and fsfreeze")
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=20)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True, timeout=20)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode().strip()}")

    def freeze(option: str) -> None:
        subprocess.run(["fsfreeze", option, str(mount)], check=True, timeout=20)

    # Thaws the disk even if this process is killed or held meanwhile.
    thaw = subprocess.Popen(["sh", "-c", f"sleep 60; fsfreeze -u '{mount}'"], stderr=subprocess.DEVNULL)
    yield mount, freeze
    thaw.kill()
    thaw.wait()
    subprocess.run(["fsfreeze", "-u", str(mount)], capture_output=True, timeout=20, check=False)
    subprocess.run(["umount", "--lazy", str(mount)], check=True, timeout=20)


@pytest.mark.long
def test_a_disk_that_holds_its_writers_for_good_does_not_hold_the_server(
    frozen_disk: tuple[Path, Callable[[str], None]],
) -> None:
    disk, freeze = frozen_disk
    directory = disk / "center"
    with ServerProcess("--checkpoint-dir", str(directory)) as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        until(lambda: is_durable(directory, STEP), "the center is durable")
        freeze("-f")
        for name in ("a", "b"):
            job.push(name, of(1), base_step=STEP)
        until(lambda: client.status().HasField("checkpoint_writing_s"), "the checkpoint is being written")
        writers = writers_of(server.pid)
        until(lambda: "D" in map(state_of, writers), "the disk holds a writer")
        server.signal(signal.SIGTERM)
        code, _, log = server.end()
        assert code == 0
        assert "the server ends, and the checkpoint of global_step" in log
        assert "Traceback" not in log
        # Its lock and its guard are gone with it, although a process that it has started still exists.
        CheckpointHome(directory).close()
        assert "D" in map(state_of, writers)
        freeze("-u")
        until(lambda: not any(map(state_of, writers)), "the writers are gone")
        loaded = load_latest(directory)
        assert loaded is not None
        assert loaded.global_step == STEP
