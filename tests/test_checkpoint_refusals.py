"""A machine that refuses memory, files or descriptors while a checkpoint is written, and a center of any size."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelaverage.manifest import Manifest, Variable
from ps_server.checkpoints import keeper as keeping
from ps_server.checkpoints import writer as checkpoint_writer
from ps_server.checkpoints import writer_process
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.reading import load_latest
from tests.checkpoints import (
    checkpoint_of,
    content,
    in_segment,
    is_durable,
    small,
)
from tests.keeper_plays import play


def test_a_server_without_descriptors_still_writes_a_center_in_shared_memory(tmp_path: Path) -> None:
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
    owner: Any, name: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_large_center_is_written_whole_in_shared_memory_or_not(tmp_path: Path) -> None:
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
