"""A server continues from the newest usable checkpoint; pruning keeps the right ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from ps_server.checkpoints import fields as checkpoint_fields
from ps_server.checkpoints import reading, writer_process
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import Checkpoint, CheckpointError, find_latest, load_latest
from tests.checkpoints import (
    content,
    durable,
    faulty_writer,
    in_segment,
    make_durable,
    opened_keeper,
    prune,
    read,
    small,
    steps,
    write_file,
    write_fresh,
)
from tests.conftest import StartServer
from tests.jobs import CENTER
from tests.raw_client import until
from tests.test_server_process import ServerProcess


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def reboot() -> None:
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
        monkeypatch.setattr(checkpoint_fields, "_BOOT_ID", boot_id)

    return reboot


# The newest one that is usable.


def test_a_fresh_file_is_not_trusted_after_a_reboot_but_a_durable_one_is(
    tmp_path: Path, reboot: Callable[[], None]
) -> None:
    fresh, kept = write_fresh(tmp_path, small(5)), durable(tmp_path, 4)
    assert content(read(fresh)) == content(small(5))
    reboot()
    with pytest.raises(CheckpointError, match="may not have reached the disk"):
        read(fresh)
    assert content(read(kept)) == content(small(4))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    write_file(path, CENTER, {})


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [truncated, flipped, emptied, foreign, a_directory]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, good, bad = durable(tmp_path, 3), durable(tmp_path, 4), durable(tmp_path, 5)
    damage(bad)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert content(loaded) == content(small(4))
    passed_over, going_on = caplog.messages
    assert str(bad) in passed_over
    assert str(good) in going_on
    assert {older, good, bad} == set(tmp_path.iterdir())


def test_fresh_checkpoints_of_another_boot_are_passed_over_for_the_durable_one(
    tmp_path: Path, reboot: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    good = durable(tmp_path, 4)
    fresh = [write_fresh(tmp_path, small(step)) for step in (5, 6)]
    reboot()
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.global_step == 4
    assert all(path.exists() for path in [good, *fresh])
    assert [str(path) in message for path, message in zip(fresh[::-1], caplog.messages, strict=False)] == [True, True]


def test_of_one_step_the_fresh_one_is_taken_and_if_it_is_damaged_the_durable_one(
    tmp_path: Path,
) -> None:
    durable(tmp_path, 4, seed=1)
    fresh = write_fresh(tmp_path, small(4, seed=2))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert content(loaded) == content(small(4, seed=2))
    truncated(fresh)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert content(loaded) == content(small(4, seed=1))


def test_a_directory_without_checkpoints_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "center.safetensors").write_bytes(b"of somebody else")
    assert load_latest(tmp_path) is None
    assert caplog.messages == []


def test_where_no_checkpoint_is_usable_a_server_refuses_to_start_without_them(tmp_path: Path) -> None:
    damaged = durable(tmp_path)
    truncated(damaged)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        load_latest(tmp_path)
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server:
        code, out, err = server.end()
    assert (code, out) == (1, "")
    assert "move them away to start without them" in err
    assert damaged.exists()


def test_what_a_killed_writer_left_is_removed_when_a_server_starts_and_not_when_somebody_looks(
    start_server: StartServer, tmp_path: Path
) -> None:
    kept = durable(tmp_path)
    left = [kept.with_name(f"center-00000000000000000004.fresh.{number}.tmp") for number in ("123", "0f" * 8)]
    for path in left:
        path.write_bytes(b"half of")
    other = tmp_path / "notes.tmp"
    other.touch()
    found, _ = find_latest(tmp_path)
    assert found is not None
    assert found[0] == kept
    load_latest(tmp_path)
    assert all(path.exists() for path in left)
    start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    until(lambda: set(tmp_path.iterdir()) == {kept, other, tmp_path / "lock"}, "what was left is removed")


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "inline"])
def test_a_writer_that_is_killed_in_the_middle_leaves_only_what_the_next_one_removes(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die = "files.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"

    async def write(step: int) -> str:
        with opened_keeper(CheckpointPolicy(tmp_path)) as keeper:
            await keeper.write(in_segment(small(step)) if shared else small(step))
            await keeper.finish(20)
            return keeper.problem

    with monkeypatch.context() as patch:
        patch.setattr(writer_process, "command", faulty_writer(die))
        assert "was ended by signal 9" in asyncio.run(write(1))
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "lock"] == [".tmp"]
    assert asyncio.run(write(2)) == ""
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "lock"] == [".safetensors"]
    assert steps(tmp_path) == [2]


def test_a_reader_of_the_directory_gets_the_newest_one_while_a_server_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable(tmp_path, 4)
    fresh = write_fresh(tmp_path, small(5))

    read_now = reading.read

    def read_late(directory: int, name: str, max_model_bytes: int | None) -> Checkpoint:
        if fresh.exists():
            make_durable(fresh)
        return read_now(directory, name, max_model_bytes)

    monkeypatch.setattr(reading, "read", read_late)
    found, passed_over = find_latest(tmp_path)
    assert found is not None
    assert (found[1].global_step, passed_over) == (5, [])


def test_a_link_that_leads_nowhere_is_passed_over(tmp_path: Path) -> None:
    kept = durable(tmp_path, 4)
    link = tmp_path / f"center-{5:020d}.fresh.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    found, passed_over = find_latest(tmp_path)
    assert found is not None
    assert (found[0], [path for path, _ in passed_over]) == (kept, [link])


# Pruning.


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_durable_ones_are_kept(keep: int, tmp_path: Path) -> None:
    for step in range(5):
        durable(tmp_path, step)
    newest = durable(tmp_path, 5)
    fresh = write_fresh(tmp_path, small(6))
    prune(newest, keep)
    assert steps(tmp_path) == [*range(6 - keep, 6), 6]
    assert fresh.exists()


def test_fresh_ones_that_were_overtaken_go(tmp_path: Path) -> None:
    durable(tmp_path, 2)
    write_fresh(tmp_path, small(3))
    write_fresh(tmp_path, small(4))
    prune(durable(tmp_path, 5), 3)
    assert steps(tmp_path) == [2, 5]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_only_good_one_stays_however_many_damaged_ones_are_newer(
    keep: int, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    for step in (5, 6, 7, 8):
        damage(durable(tmp_path, step, seed=9))
    prune(durable(tmp_path, 5), keep)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert content(loaded) == content(small(5))


def test_one_that_is_written_again_takes_the_place_of_its_like(tmp_path: Path) -> None:
    durable(tmp_path, 4)
    durable(tmp_path, 5, seed=1)
    prune(durable(tmp_path, 5, seed=2), 2)
    assert steps(tmp_path) == [4, 5]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert content(loaded) == content(small(5, seed=2))
