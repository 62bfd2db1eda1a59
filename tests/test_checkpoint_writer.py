"""The checkpoint writers: processes that may hang or die, and a directory that may be removed."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelaverage.manifest import Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.checkpoints import keeper as keeping
from ps_server.checkpoints import writer as checkpoint_writer
from ps_server.checkpoints import writer_process
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import find_latest, load_latest
from ps_server.server import UnusableSettingError
from tests.checkpoints import (
    checkpoint_of,
    content,
    durable,
    faulty_writer,
    in_segment,
    is_durable,
    opened_keeper,
    small,
    steps,
    writers_of,
)
from tests.conftest import StartServer
from tests.jobs import STEP, Job, of
from tests.raw_client import RawClient, until
from tests.scraped import scrape
from tests.test_server_process import ServerProcess

Play = Callable[[Callable[[Keeper], Any], CheckpointPolicy], None]


@pytest.fixture
def play() -> Play:
    """Runs a coroutine with a keeper."""

    def play(body: Callable[[Keeper], Any], policy: CheckpointPolicy) -> None:
        async def run() -> None:
            with opened_keeper(policy) as keeper:
                await asyncio.wait_for(body(keeper), 60)

        asyncio.run(run())

    return play


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The events, in order."""
    return [record.modelaverage_event for record in caplog.records]  # type: ignore[attr-defined]


async def soon(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Stops the writers during the context, as if the disk held them."""
    assert processes
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


# A disk that hangs.


def test_a_write_that_hangs_is_said_again_and_again_and_when_it_came_through(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def test_two_writes_come_one_after_the_other(play: Play, tmp_path: Path) -> None:
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


def state_of(process: int) -> str:
    """The state of the process as a letter; empty if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except FileNotFoundError:
        return ""


# Processes that die.


def test_a_writer_that_dies_between_two_checkpoints_costs_none(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


# Refusals of the machine.


def test_a_server_without_descriptors_still_writes_a_center_in_shared_memory(play: Play, tmp_path: Path) -> None:
    async def body(keeper: Keeper) -> None:
        checkpoint = in_segment(small(1))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open(os.devnull, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, before[1]))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            await keeper.write(checkpoint)
            await keeper.finish(20)
            assert (keeper.problem, keeper.step) == ("", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for descriptor in taken:
                os.close(descriptor)

    play(body, CheckpointPolicy(tmp_path))
    assert is_durable(tmp_path, 1)


REFUSED = {
    "no descriptors": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "no memory": MemoryError(),
    "no memory of the system's": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "no thread": RuntimeError("can't start new thread"),
}
CALLS = [
    (keeping, "DiskWait"),
    (keeping, "fields_of"),
    (keeping, "lay_out"),
    (keeping, "fresh_name"),
    (keeping, "_sources"),
    (keeping, "bytes_of"),
    (writer_process.WriterProcess, "submit"),
    (writer_process.WriterProcess, "_connected"),
    (checkpoint_writer, "send"),
    (checkpoint_writer, "receive"),
    (writer_process, "Reply"),
]


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
def test_whatever_is_refused_while_a_checkpoint_is_written_is_a_problem_and_the_next_one_is_written(
    owner: Any, name: str, refused: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(keeper: Keeper) -> None:
        with monkeypatch.context() as patch:

            def refuse(*_: object, **__: object) -> None:
                raise REFUSED[refused]

            patch.setattr(owner, name, refuse)
            await asyncio.wait_for(keeper.write(small(1)), 20)
            assert keeper.problem.startswith(f"no checkpoint in {tmp_path}: ")
            assert keeper.writing_since_s is None
            await asyncio.wait_for(keeper.finish(20), 20)
        await keeper.write(small(2))
        await keeper.finish(20)
        assert (keeper.problem, keeper.step) == ("", 2)

    play(body, CheckpointPolicy(tmp_path))
    assert is_durable(tmp_path, 2)


# The directory.


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


def test_nothing_that_lies_in_the_way_is_written_into(play: Play, tmp_path: Path) -> None:
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


def test_a_directory_that_was_removed_is_made_again_and_said(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def test_a_directory_that_cannot_be_made_again_is_a_problem(play: Play, tmp_path: Path) -> None:
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


def test_a_directory_may_be_a_link_or_have_any_name(play: Play, tmp_path: Path) -> None:
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


def test_a_large_center_is_written_whole_in_shared_memory_or_not(play: Play, tmp_path: Path) -> None:
    variables = [Variable(f"v{n}", ("float16", "float32", "float64")[n % 3], (100_001 + n,)) for n in range(9)]
    whole = checkpoint_of(Manifest(tuple(variables)), global_step=1, counted={})
    for directory, written in ((tmp_path / "a", whole), (tmp_path / "b", in_segment(whole))):

        async def body(keeper: Keeper, written: Any = written) -> None:
            await keeper.write(written)
            await keeper.finish(20)
            assert keeper.problem == ""

        play(body, CheckpointPolicy(directory))
        loaded = load_latest(directory)
        assert loaded is not None
        assert content(loaded) == content(whole)
