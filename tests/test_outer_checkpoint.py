"""An outer optimizer's state on disk, and a server that goes on with it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelaverage.manifest import Manifest, Variable
from modelaverage.outer import OUTER_OPTIMIZERS, text_of
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.center import Center
from ps_server.checkpoints.fields import Checkpoint, boot_id, fields_of
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import CheckpointError
from ps_server.unusable import UnusableSettingError
from tests.centers import ALL_DTYPES
from tests.checkpoints import (
    checkpoint_of,
    content,
    header_of,
    in_segment,
    make_durable,
    opened_keeper,
    read,
    small,
    write_file,
    write_fresh,
)
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP, Job, of
from tests.raw_client import RawClient, flat_bytes
from tests.toy_outer import ToyMomentum

TOY = ToyMomentum()


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTER_OPTIMIZERS, "toy", ToyMomentum)


def with_state(plain: Checkpoint, seed: int = 0) -> Checkpoint:
    """The same center with any state of the toy."""
    chance = np.random.default_rng(seed)
    state = Center(plain.manifest, outer=TOY).current.state
    for by_variable in state.arrays.values():
        for array in by_variable.values():
            array[...] = chance.normal(size=array.shape)
    return dataclasses.replace(plain, counted=plain.counted or {}, outer=TOY, state=state.arrays)


# Files.


@pytest.mark.parametrize("manifest", [ALL_DTYPES, Manifest((Variable("nothing", "bfloat16", (0, 3)),), 8)])
def test_state_that_is_written_is_read_bit_for_bit(manifest: Manifest, tmp_path: Path) -> None:
    written = with_state(checkpoint_of(manifest))
    fresh = write_fresh(tmp_path, written)
    assert content(read(fresh)) == content(written)
    found = read(make_durable(fresh))
    assert content(found) == content(written)
    assert found.outer == TOY
    assert {slot: list(arrays) for slot, arrays in found.state.items()} == {
        slot: list(arrays) for slot, arrays in written.state.items()
    }


def test_a_center_in_shared_memory_and_its_state_make_the_same_file_as_inline(tmp_path: Path) -> None:
    async def write(directory: Path, checkpoint: Checkpoint) -> bytes:
        with opened_keeper(CheckpointPolicy(directory)) as keeper:
            assert await keeper.write(checkpoint)
            await keeper.finish(20)
        (path,) = directory.glob("*.safetensors")
        assert content(read(path)) == content(checkpoint)
        return path.read_bytes()

    inline = with_state(small())
    shared = with_state(in_segment(small()))
    assert asyncio.run(write(tmp_path / "shared", shared)) == asyncio.run(write(tmp_path / "inline", inline))


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    path = write_fresh(tmp_path, with_state(checkpoint_of(ALL_DTYPES)))
    begin = int.from_bytes(path.read_bytes()[:8], "little") + 8
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    for name, tensor in header_of(path).items():
        if name != "__metadata__":
            assert (begin + tensor["data_offsets"][0]) % sizes[tensor["dtype"]] == 0


def test_a_file_of_the_plain_average_says_nothing_of_outer_optimizers(tmp_path: Path) -> None:
    header = header_of(write_fresh(tmp_path, small()))
    about = header.pop("__metadata__")
    assert list(header) == sorted(CENTER, key=lambda name: -CENTER[name].itemsize)
    assert list(about) == [
        "format",
        "global_step",
        "variables",
        "fragment_size_bytes",
        "contributors",
        "counted",
        "finished",
        "boot_id",
    ]


def test_names_of_state_never_clash_with_those_of_variables(tmp_path: Path) -> None:
    names = ("w", "outer/velocity/w", "_outer/velocity/w", "___outer/", "outer/", "velocity")
    manifest = Manifest(tuple(Variable(name, "float16", (number,)) for number, name in enumerate(names)))
    written = with_state(checkpoint_of(manifest))
    assert len(written.tensors) == 3 * len(names)
    assert {name for name in written.tensors if name.startswith("__outer/")} == {
        f"__outer/{slot}/{name}" for slot in ("velocity", "master") for name in names
    }
    assert content(read(write_fresh(tmp_path, written))) == content(written)


TOY_TEXT = text_of(TOY)
VELOCITY_OF_W = "outer/velocity/w"


@pytest.mark.parametrize(
    ("outer", "tensors", "why"),
    [
        ("yogi", {}, "outer optimizer 'yogi' is not known here, only average, sgd, adam, toy"),
        ("toy:rate=1.0", {}, "outer optimizer toy has no setting 'rate'"),
        ("toy:lr=x", {}, "toy: lr is 'x'; it must be a number"),
        ("toy:lr=inf", {}, "ToyMomentum: lr is inf"),
        ("toy", {}, "damaged .*no server writes its outer optimizer as 'toy'"),
        ("average", {}, "damaged .*no server writes its outer optimizer as 'average'"),
        (
            TOY_TEXT,
            {VELOCITY_OF_W: None},
            "outer optimizer toy keeps velocity of every variable; there is none of 'w'",
        ),
        (
            TOY_TEXT,
            {VELOCITY_OF_W: np.zeros(39, np.float32)},
            r"velocity of variable 'w' is float32\[39\]; outer optimizer toy needs float32\[40\]",
        ),
        (
            TOY_TEXT,
            {VELOCITY_OF_W: np.zeros(40)},
            r"velocity of variable 'w' is float64\[40\]; outer optimizer toy needs float32\[40\]",
        ),
        (TOY_TEXT, {"outer/acceleration/w": np.zeros(40)}, "its list of variables does not match its tensors"),
    ],
)
def test_state_that_does_not_fit_its_outer_optimizer_is_refused(
    outer: str, tensors: Mapping[str, Any], why: str, tmp_path: Path
) -> None:
    written = with_state(small())
    arrays = {name: array for name, array in {**written.tensors, **tensors}.items() if array is not None}
    path = write_fresh(tmp_path, written)
    write_file(path, arrays, {**fields_of(written, boot_id()), "outer": outer})
    with pytest.raises(CheckpointError, match=why):
        read(path)


def test_a_checkpoint_whose_state_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    written = with_state(checkpoint_of(ALL_DTYPES))
    needed = Center.memory_bytes(ALL_DTYPES, TOY)
    path = write_fresh(tmp_path, written)
    assert content(read(path, max_model_bytes=needed // 2)) == content(written)
    with pytest.raises(CheckpointError, match=f"needs {needed} bytes of memory, over twice --max-model-bytes"):
        read(path, max_model_bytes=needed // 2 - 1)


# A server that goes on.


def push_all(job: Job, step: int, values: int) -> bytes:
    streams = [job.push(name, of(values), base_step=step, push_id=step) for name in ("a", "b")]
    answers = [stream.answer() for stream in streams]
    assert all(outcome.outcome == pb.OUTCOME_COMMITTED for outcome, _ in answers)
    assert answers[0][1] == answers[1][1]
    return answers[0][1]


@pytest.mark.parametrize("shared", [False, True])
def test_a_server_goes_on_with_the_optimizer_and_the_state_of_its_checkpoint(
    shared: bool, start_server: StartServer, tmp_path: Path
) -> None:
    center = Center(small().manifest, outer=TOY)
    center.load_arrays(CENTER, {"velocity": {n: np.zeros(a.shape) for n, a in CENTER.items()}, "master": dict(CENTER)})
    current = center.current
    written = dataclasses.replace(small(), arrays=current.arrays, outer=TOY, state=current.state.arrays)
    write_fresh(tmp_path, dataclasses.replace(written, counted={}))
    velocity = {name: np.zeros(array.shape) for name, array in CENTER.items()}
    expected = {name: array.astype(np.float64) for name, array in CENTER.items()}
    for step in range(STEP, STEP + 4):  # another server for every round; all values are exact
        server = start_server(2, checkpoints=CheckpointPolicy(tmp_path), shared=shared)
        with RawClient(server.address) as client:
            job = Job(client, server.address)
            came = push_all(job, step, 4 * step)
        server.stop()
        for name in expected:
            velocity[name] = TOY.momentum * velocity[name] + (expected[name] - 4 * step)
            expected[name] = expected[name] - TOY.lr * velocity[name]
        assert came == flat_bytes({name: array.astype(CENTER[name].dtype) for name, array in expected.items()})


def test_a_server_refuses_to_start_if_it_does_not_know_the_outer_optimizer_of_its_checkpoints(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fresh(tmp_path, with_state(small()))
    monkeypatch.delitem(OUTER_OPTIMIZERS, "toy")
    with pytest.raises(UnusableSettingError, match="none of its 1 checkpoints can be used"):
        start_server(2, checkpoints=CheckpointPolicy(tmp_path))
