"""The checkpoint keeper: order, slow and failing disks."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints import writer_process
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import Checkpoint
from ps_server.unusable import UnusableSettingError
from tests.checkpoints import (
    content,
    durable,
    faulty_writer,
    in_segment,
    is_durable,
    opened_keeper,
    read,
    small,
    steps,
)
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.kept_jobs import job_of, newest, push_all
from tests.raw_client import Arrays, RawClient, flat_bytes, until

# The keeper.


def test_what_is_written_from_shared_memory_is_what_is_written_inline(tmp_path: Path) -> None:
    async def write(directory: Path, checkpoint: Checkpoint) -> bytes:
        with opened_keeper(CheckpointPolicy(directory)) as keeper:
            await keeper.write(checkpoint)
            await keeper.finish(20)
            assert (keeper.problem, keeper.step) == ("", checkpoint.global_step)
        (path,) = directory.glob("*.safetensors")
        assert content(read(path)) == content(checkpoint)
        return path.read_bytes()

    inline = asyncio.run(write(tmp_path / "inline", small()))
    assert asyncio.run(write(tmp_path / "shared", in_segment(small()))) == inline
    assert durable(tmp_path).read_bytes() == inline


def test_a_disk_that_is_slower_than_the_rounds_does_not_fill_up_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    slowly = f"""
now = files.make_durable
def slowly(directory, name):
    open({str(begun)!r}, "w").close()
    while not os.path.exists({str(go_on)!r}):
        time.sleep(0.01)
    return now(directory, name)
files.make_durable = slowly"""

    async def rounds() -> None:
        with opened_keeper(CheckpointPolicy(tmp_path)) as keeper:
            await keeper.write(small(1))
            await asyncio.to_thread(until, begun.exists, "the first is about to be made durable")
            for step in range(2, 9):
                await keeper.write(small(step))
            # The last removal goes before the next write.
            assert steps(tmp_path) in ([1, 7, 8], [1, 8])
            go_on.touch()
            await keeper.finish(20)

    monkeypatch.setattr(writer_process, "command", faulty_writer(slowly))
    asyncio.run(rounds())
    assert steps(tmp_path) == [1, 8]
    assert is_durable(tmp_path, 8)


@pytest.mark.parametrize("place", ["before it is looked at", "when its checksum is known"])
def test_of_two_checkpoints_of_one_step_the_later_becomes_durable_even_if_it_comes_during_the_other(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    function = {"before it is looked at": "make_durable", "when its checksum is known": "_checksum"}[place]
    slowly = f"""
now = files.{function}
def wait():
    open({str(begun)!r}, "w").close()
    while not os.path.exists({str(go_on)!r}):
        time.sleep(0.01)
def before(*arguments):
    wait()
    return now(*arguments)
def after(*arguments):
    result = now(*arguments)
    wait()
    return result
files.{function} = {"before" if function == "make_durable" else "after"}"""
    later = dataclasses.replace(small(7, seed=1), finished=frozenset({"a"}))

    async def writes() -> None:
        with opened_keeper(CheckpointPolicy(tmp_path)) as keeper:
            await keeper.write(small(7))
            await asyncio.to_thread(until, begun.exists, "the first is being made durable")
            await keeper.write(later)
            go_on.touch()
            await keeper.finish(20)
            assert keeper.problem == ""

    monkeypatch.setattr(writer_process, "command", faulty_writer(slowly))
    asyncio.run(writes())
    (path,) = tmp_path.glob("*.safetensors")
    assert is_durable(tmp_path, 7)
    assert (read(path).finished, content(read(path))) == (later.finished, content(later))


def failing_while_there_is(path: Path, function: str) -> str:
    """A fault: this function of files.py raises EIO as long as a certain file exists."""
    return f"""
now = files.{function}
def failing(*arguments):
    if os.path.exists({str(path)!r}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return now(*arguments)
files.{function} = failing"""


@pytest.mark.parametrize("failing", ["write", "make_durable"])
def test_a_disk_that_fails_is_told_once_and_when_it_works_again_all_is_well(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault, directory = tmp_path / "fault", tmp_path / "center"

    async def rounds() -> None:
        with opened_keeper(CheckpointPolicy(directory)) as keeper:
            await keeper.write(small(1))
            await keeper.finish(20)
            assert keeper.problem == ""
            good = list(directory.iterdir())
            fault.touch()
            for step in (2, 3, 4):
                await keeper.write(small(step))
                await keeper.finish(20)
                assert str(directory) in keeper.problem
                assert "Input/output error" in keeper.problem
            assert len(caplog.messages) == 1
            assert all(path.exists() for path in good)
            assert len(steps(directory)) <= 2
            fault.unlink()
            await keeper.write(small(5))
            await keeper.finish(20)
            assert (keeper.problem, keeper.step) == ("", 5)
            assert steps(directory) == [1, 5]
            assert is_durable(directory, 5)

    monkeypatch.setattr(writer_process, "command", faulty_writer(failing_while_there_is(fault, failing)))
    asyncio.run(rounds())


def test_what_could_not_be_made_durable_is_tried_again_when_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, directory = tmp_path / "fault", tmp_path / "center"
    fault.touch()

    async def rounds() -> None:
        with opened_keeper(CheckpointPolicy(directory)) as keeper:
            await keeper.write(small(1))
            while "Input/output error" not in keeper.problem:
                await asyncio.sleep(0.01)
            fault.unlink()
            await keeper.finish(20)
            assert keeper.problem == ""

    monkeypatch.setattr(writer_process, "command", faulty_writer(failing_while_there_is(fault, "make_durable")))
    asyncio.run(rounds())
    assert is_durable(directory, 1)


# Disks that fail.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    mounted = subprocess.run(mounting, capture_output=True, text=True, timeout=20, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], timeout=20, check=True)


def fill(path: Path) -> None:
    """Until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


class Failing:
    """A job whose disk fails for some rounds."""

    def __init__(self, job: Job, caplog: pytest.LogCaptureFixture) -> None:
        self._job, self._caplog, self._step = job, caplog, STEP

    def round(self) -> pb.GetStatusResponse:
        push_all(self._job, self._step, of(self._step))
        self._step += 1
        return self._job.client.status()

    def assert_rounds_go_on_and_say(self, why: str) -> None:
        before = self._job.client.status().checkpoint_step
        for _ in range(3):
            status = self.round()
            assert why in status.checkpoint_problem
            assert status.checkpoint_step == before
        said = [record for record in self._caplog.records if record.getMessage().startswith("no checkpoint in")]
        assert [(why in record.getMessage(), record.levelno) for record in said] == [(True, logging.WARNING)]

    def assert_all_is_well(self, directory: Path) -> None:
        assert self.round().checkpoint_step == self._step
        until(lambda: self._job.client.status().checkpoint_problem == "", "the problem is over")
        assert flat_bytes(newest(directory).arrays) == self._job.center()


def test_a_full_disk_holds_up_no_round_and_spoils_no_checkpoint(
    small_disk: Path, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with job_of(start_server(2, checkpoints=CheckpointPolicy(small_disk))) as job:
        failing = Failing(job, caplog)
        failing.round()
        until(lambda: is_durable(small_disk, STEP + 1), "the round is durable")
        fill(small_disk / "filler")
        before = sorted(small_disk.iterdir())
        failing.assert_rounds_go_on_and_say("No space left on device")
        assert sorted(small_disk.iterdir()) == before
        assert newest(small_disk).global_step == STEP + 1
        (small_disk / "filler").unlink()
        failing.assert_all_is_well(small_disk)


def test_a_disk_that_becomes_read_only_holds_up_no_round_and_spoils_no_checkpoint(
    small_disk: Path, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with job_of(start_server(2, checkpoints=CheckpointPolicy(small_disk))) as job:
        until(lambda: is_durable(small_disk, STEP), "the center is durable")
        remount(small_disk, "ro")
        failing = Failing(job, caplog)
        failing.assert_rounds_go_on_and_say("Read-only file system")
        assert newest(small_disk).global_step == STEP
        remount(small_disk, "rw")
        failing.assert_all_is_well(small_disk)


def remount(path: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(path)], timeout=20, check=True)


def test_a_write_that_fails_holds_up_no_round(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, directory = tmp_path / "fault", tmp_path / "center"
    monkeypatch.setattr(writer_process, "command", faulty_writer(failing_while_there_is(fault, "write")))
    with job_of(start_server(2, checkpoints=CheckpointPolicy(directory))) as job:
        failing = Failing(job, caplog)
        fault.touch()
        failing.assert_rounds_go_on_and_say("Input/output error")
        assert steps(directory) == [STEP]
        fault.unlink()
        failing.assert_all_is_well(directory)


def test_a_center_that_cannot_be_kept_is_initialized_all_the_same(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    center: Arrays = {"__metadata__": np.arange(3).astype(ml_dtypes.bfloat16)}
    server = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with RawClient(server.address) as client:
        assert client.initialize(center).initialized
        assert "__metadata__" in client.status().checkpoint_problem
        assert client.pull()[1] == flat_bytes(center)
    server.stop()
    assert steps(tmp_path) == []
    assert len(caplog.messages) == 1


def test_a_directory_that_cannot_be_used_is_refused_when_the_server_starts(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnusableSettingError, match="--checkpoint-dir") as refused:
        start_server(2, checkpoints=CheckpointPolicy(tmp_path / "file"))
    assert str(tmp_path / "file") in str(refused.value)
