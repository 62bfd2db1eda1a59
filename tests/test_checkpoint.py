"""The center on disk: what is written comes back or is told from it, and a disk that fails holds up no round."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelaverage.manifest import DTYPES, Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints import fields as checkpoint_fields
from ps_server.checkpoints import reading, writer_process
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import Checkpoint, CheckpointError, find_latest, load_latest
from ps_server.rules.policy import RoundPolicy
from ps_server.server import UnusableSettingError
from tests.checkpoints import (
    checkpoint_of,
    content,
    durable,
    faulty_writer,
    header_of,
    in_segment,
    is_durable,
    make_durable,
    opened_keeper,
    prune,
    read,
    small,
    steps,
    write_file,
    write_fresh,
    writers_of,
)
from tests.conftest import RunningServer, StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of
from tests.raw_client import Arrays, RawClient, flat_bytes, rest_of_center, until
from tests.strategies import fast, manifests
from tests.test_server_process import ServerProcess


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def reboot() -> None:
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
        monkeypatch.setattr(checkpoint_fields, "_BOOT_ID", boot_id)

    return reboot


# Written and read.


def worker_ids() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), min_size=1, max_size=32)


@given(
    manifests(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63 - 1),
    st.lists(worker_ids(), unique=True).map(tuple),
    st.dictionaries(
        worker_ids(),
        st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1)),
    ),
)
@settings(fast, max_examples=40)
def test_what_is_written_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    manifest: Manifest,
    seed: int,
    global_step: int,
    contributors: tuple[str, ...],
    counted: dict[str, tuple[bytes, int]],
) -> None:
    written = checkpoint_of(manifest, seed, global_step, contributors=contributors, counted=counted)
    fresh = write_fresh(tmp_path_factory.getbasetemp(), written)
    assert content(read(fresh)) == content(written)
    kept = make_durable(fresh)
    assert content(read(kept)) == content(written)
    assert not fresh.exists()
    kept.unlink()


def test_names_and_their_order_are_kept(tmp_path: Path) -> None:
    names = ("z", "a", 'quote " and \\', "line\nbreak \0", "ä🙂", "x" * 1024, "layer.0/weight:0")
    manifest = Manifest(tuple(Variable(name, "bfloat16", (number,)) for number, name in enumerate(names)))
    assert tuple(read(write_fresh(tmp_path, checkpoint_of(manifest))).arrays) == names


def test_every_variable_is_aligned(tmp_path: Path) -> None:
    dtypes = ("float16", "float64", "bfloat16", "float32", "float64")
    manifest = Manifest(tuple(Variable(f"v{number}", dtype, (3,)) for number, dtype in enumerate(dtypes)))
    path = write_fresh(tmp_path, checkpoint_of(manifest))
    header = header_of(path)
    begin = int.from_bytes(path.read_bytes()[:8], "little") + 8
    for number, dtype in enumerate(dtypes):
        assert (begin + header[f"v{number}"]["data_offsets"][0]) % DTYPES[dtype].itemsize == 0


def test_equal_centers_make_equal_files(tmp_path: Path) -> None:
    assert durable(tmp_path) == durable(tmp_path)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_checkpoint_is_for_this_user_alone_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        fresh = write_fresh(tmp_path, small())
        assert fresh.stat().st_mode & 0o777 == 0o600
        assert make_durable(fresh).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_name_that_the_format_cannot_hold_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="__metadata__"):
        write_fresh(tmp_path, checkpoint_of(Manifest((Variable("__metadata__", "float32", (2,)),))))
    assert list(tmp_path.iterdir()) == []


# What is not a checkpoint.


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "durable"])
def test_a_file_that_is_truncated_anywhere_is_refused(kept: bool, tmp_path: Path) -> None:
    path = durable(tmp_path) if kept else write_fresh(tmp_path, small())
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            read(path)
    path.write_bytes(whole)
    assert content(read(path)) == content(small())


def test_a_durable_file_with_any_byte_changed_is_refused(tmp_path: Path) -> None:
    path = durable(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            read(path)


@given(st.binary(max_size=200), st.booleans())
@fast
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, with_header: bool) -> None:
    path = tmp_path_factory.getbasetemp() / f"center-{STEP:020d}.fresh.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if with_header else data)
    with pytest.raises(CheckpointError):
        read(path)
    path.unlink()


def about(path: Path) -> dict[str, str]:
    fields: dict[str, str] = header_of(path)["__metadata__"]
    return fields


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), values),
    max_leaves=5,
)


@given(
    st.sampled_from(["global_step", "variables", "fragment_size_bytes", "contributors", "counted", "boot_id"]),
    st.none() | _JSON.map(json.dumps),
)
@fast
def test_a_file_whose_fields_say_anything_else_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: str | None
) -> None:
    path = write_fresh(tmp_path_factory.getbasetemp(), small())
    fields = about(path)
    del fields[name]
    write_file(path, small().arrays, fields if value is None else {**fields, name: value})
    with suppress(CheckpointError):
        assert isinstance(read(path), Checkpoint)
    path.unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "pt"}, "not written by ps-server"),
        ({"global_step": str(STEP + 1)}, "name"),
        ({"global_step": "-1"}, "global_step '-1'"),
        ({"variables": '["w"]'}, "list of variables"),
        ({"fragment_size_bytes": "7"}, "fragment_size_bytes 7"),
        ({"counted": '{"a": ["not hex", 1]}'}, "damaged"),
        ({"counted": '{"a": ["00", Infinity]}'}, "Infinity"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change: dict[str, str], why: str, tmp_path: Path) -> None:
    path = write_fresh(tmp_path, small())
    write_file(path, small().arrays, {**about(path), **change})
    with pytest.raises(CheckpointError, match=why):
        read(path)


def test_a_file_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    path = write_fresh(tmp_path, small())
    with pytest.raises(CheckpointError, match="name"):
        read(path.rename(tmp_path / "center-3.fresh.safetensors"))


def test_a_fresh_file_is_not_trusted_after_a_reboot_but_a_durable_one_is(
    tmp_path: Path, reboot: Callable[[], None]
) -> None:
    fresh, kept = write_fresh(tmp_path, small(5)), durable(tmp_path, 4)
    assert content(read(fresh)) == content(small(5))
    reboot()
    with pytest.raises(CheckpointError, match="may not have reached the disk"):
        read(fresh)
    assert content(read(kept)) == content(small(4))


# The newest one that is usable.


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


def test_of_one_step_the_fresh_one_is_taken_for_it_is_the_later_and_if_it_is_damaged_the_durable_one(
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


def test_where_no_checkpoint_is_usable_a_server_refuses_to_begin_anew(tmp_path: Path) -> None:
    damaged = durable(tmp_path)
    truncated(damaged)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        load_latest(tmp_path)
    with ServerProcess("--checkpoint-dir", str(tmp_path)) as server:
        code, out, err = server.end()
    assert (code, out) == (1, "")
    assert "move them away to begin anew" in err
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


def test_who_looks_while_a_server_is_at_work_gets_the_newest_one(
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
def test_of_two_checkpoints_of_one_step_the_later_becomes_durable_though_it_comes_in_the_midst_of_the_other(
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
    """A fault: this function of files.py says EIO as long as there is a file."""
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


# A server that keeps its center.


def push_all(job: Job, step: int, values: Arrays) -> tuple[pb.PushOutcome, bytes]:
    """A round of two workers; the first one's answer."""
    streams = [job.push(name, values, base_step=step, push_id=step) for name in ("a", "b")]
    answers = [stream.answer() for stream in streams]
    assert [outcome.global_step for outcome, _ in answers] == [step + 1] * 2
    assert all(outcome.outcome == pb.OUTCOME_COMMITTED for outcome, _ in answers)
    return answers[0]


@contextmanager
def job_of(server: RunningServer | ServerProcess) -> Iterator[Job]:
    with RawClient(server.address) as client:
        yield Job(client, server.address)


@pytest.fixture
def kept_job(start_server: StartServer, tmp_path: Path) -> Iterator[Job]:
    """Of a server that keeps its center in `tmp_path / "center"`, every round."""
    with job_of(start_server(2, checkpoints=CheckpointPolicy(tmp_path / "center"))) as job:
        yield job


def newest(directory: Path) -> Checkpoint:
    found, _ = find_latest(directory)
    assert found is not None
    return found[1]


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
    """From its call on nothing comes to the disk from this process's servers, until what it returns is called."""
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
        for number in range(4):  # more rounds than there are buffers: the one on its way to the disk stays as it is
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


# A server that goes on.


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
