"""The directory of the checkpoints: who may read it, and what happens when it is removed, moved or replaced."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import find_latest, load_latest
from tests.checkpoints import (
    content,
    durable,
    is_durable,
    small,
    steps,
)
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.keeper_plays import play, said
from tests.raw_client import RawClient, until
from tests.test_server_process import ServerProcess


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_directory_is_made_for_this_user_alone_and_one_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        CheckpointHome(tmp_path / "far" / "new").close()
        assert mode_of(tmp_path / "far" / "new") == 0o700
        assert mode_of(tmp_path / "far" / "new" / "lock") == 0o600
        (tmp_path / "old").mkdir(0o755)
        CheckpointHome(tmp_path / "old").close()
        assert mode_of(tmp_path / "old") == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        partial(os.symlink, "/dev/zero"),
        partial(os.symlink, "lock"),
        partial(os.symlink, "other"),
    ],
    ids=["FIFO", "directory", "link to a device", "link to itself", "link to nothing"],
)
def test_a_lock_that_is_no_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "lock")
    with pytest.raises(OSError, match=r"not a regular file|symbolic links|no such file|Is a directory|No such"):
        CheckpointHome(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}
    (tmp_path / "lock").rmdir() if (tmp_path / "lock").is_dir() else (tmp_path / "lock").unlink()
    CheckpointHome(tmp_path).close()


def test_nothing_that_lies_in_the_way_is_written_into(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "center", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.write_text("precious")
    (directory / f"center-{1:020d}.fresh.safetensors").symlink_to(elsewhere)

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        assert keeper.problem == ""

    play(body, CheckpointPolicy(directory))
    assert elsewhere.read_text() == "precious"
    assert is_durable(directory, 1)


def test_a_directory_that_was_removed_is_made_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "center"

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        for step in (2, 3):  # again and again
            shutil.rmtree(directory)
            await keeper.write(small(step))
            await keeper.finish(20)
            assert (keeper.problem, keeper.step) == ("", step)
            assert mode_of(directory) == 0o700
            assert steps(directory) == [step]
            with pytest.raises(BlockingIOError):
                CheckpointHome(directory)

    play(body, CheckpointPolicy(directory))
    assert said(caplog) == ["checkpoint_directory_made"] * 2
    CheckpointHome(directory).close()


def test_a_directory_that_was_removed_is_given_to_no_second_server(start_server: StartServer, tmp_path: Path) -> None:
    directory = tmp_path / "center"
    server = start_server(2, checkpoints=CheckpointPolicy(directory))
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        spoils: list[Callable[[Path], object]] = [shutil.rmtree, emptied]
        for number, spoil in enumerate(spoils):
            until(partial(is_durable, directory, STEP + number), "the center is durable")
            spoil(directory)
            with ServerProcess("--checkpoint-dir", str(directory)) as second:
                code, out, err = second.end()
            assert (code, out) == (1, "")
            assert err == f"ps-server: another server keeps its center in --checkpoint-dir {directory}\n"
            step = client.status().global_step
            streams = [job.push(name, of(1), base_step=step, push_id=step) for name in ("a", "b")]
            for stream in streams:
                assert stream.answer()[0].outcome == pb.OUTCOME_COMMITTED
            assert client.status().checkpoint_problem == ""
    server.stop()
    found, _ = find_latest(directory)
    assert found is not None
    assert found[1].global_step == STEP + 2


def emptied(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def test_a_directory_that_was_moved_away_is_a_problem_and_nothing_is_written_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, away = tmp_path / "center", tmp_path / "away"

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        before = set(directory.iterdir())
        directory.rename(away)
        await keeper.write(small(2))
        assert keeper.problem.startswith(f"no checkpoint in {directory}: it is gone")
        assert not directory.exists()
        directory.mkdir()
        (directory / "of somebody else").touch()
        for step in (3, 4):
            await keeper.write(small(step))
            assert keeper.problem.startswith(f"no checkpoint in {directory}: it is another directory")
        assert [path.name for path in directory.iterdir()] == ["of somebody else"]
        assert {path.name for path in away.iterdir()} == {path.name for path in before}
        shutil.rmtree(directory)
        away.rename(directory)
        await keeper.write(small(5))
        await keeper.finish(20)
        assert (keeper.problem, keeper.step) == ("", 5)

    play(body, CheckpointPolicy(directory))
    assert said(caplog) == ["checkpoint_failed"] * 2
    assert steps(directory) == [1, 5]


def test_a_directory_in_the_place_of_one_that_was_removed_is_taken_if_it_is_empty_and_nobodys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "center"

    async def body(keeper: Keeper) -> None:
        await keeper.write(small(1))
        await keeper.finish(20)
        shutil.rmtree(directory)
        directory.mkdir()
        theirs = durable(directory, 7)
        await keeper.write(small(2))
        assert "another directory with checkpoints has taken its place" in keeper.problem
        assert set(directory.iterdir()) == {theirs}
        theirs.unlink()
        lock = (directory / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        await keeper.write(small(3))
        assert "another server has taken its place" in keeper.problem
        assert [path.name for path in directory.iterdir()] == ["lock"]
        lock.close()
        await keeper.write(small(4))
        await keeper.finish(20)
        assert (keeper.problem, keeper.step) == ("", 4)

    play(body, CheckpointPolicy(directory))
    assert said(caplog) == ["checkpoint_failed", "checkpoint_failed", "checkpoint_directory_made"]
    assert steps(directory) == [4]


def test_a_directory_that_cannot_be_made_again_is_a_problem(tmp_path: Path) -> None:
    directory = tmp_path / "center"

    async def body(keeper: Keeper) -> None:
        shutil.rmtree(directory)
        directory.touch()
        await keeper.write(small(1))
        assert "Not a directory" in keeper.problem
        directory.unlink()
        await keeper.write(small(2))
        await keeper.finish(20)
        assert (keeper.problem, keeper.step) == ("", 2)

    play(body, CheckpointPolicy(directory))
    assert is_durable(directory, 2)


def test_a_directory_may_be_a_link_or_have_any_name(tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode(b"caf\xe9 \n'\"")
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)

    async def body(keeper: Keeper) -> None:
        with pytest.raises(BlockingIOError):
            CheckpointHome(real)
        await keeper.write(small(1))
        await keeper.finish(20)
        assert keeper.problem == ""

    play(body, CheckpointPolicy(link))
    loaded = load_latest(real)
    assert loaded is not None
    assert content(loaded) == content(small(1))
