"""Files of checkpoints: what is written is read bit for bit, and anything else is refused."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelaverage.manifest import DTYPES, MAX_FROZEN_BYTES, Manifest, Variable
from ps_server.checkpoints.reading import Checkpoint, CheckpointError
from tests.checkpoints import (
    checkpoint_of,
    content,
    durable,
    header_of,
    make_durable,
    read,
    small,
    write_file,
    write_fresh,
)
from tests.jobs import STEP
from tests.strategies import fast, manifests

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
    for end in reversed(range(len(whole))):  # rewriting a file would take a write to the disk each time
        os.truncate(path, end)
        with pytest.raises(CheckpointError):
            read(path)
    path.write_bytes(whole)
    assert content(read(path)) == content(small())


def test_a_durable_file_with_any_byte_changed_is_refused(tmp_path: Path) -> None:
    path = durable(tmp_path)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(path.read_bytes()):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), at)
            with pytest.raises(CheckpointError):
                read(path)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert content(read(path)) == content(small())


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
    st.sampled_from(
        [
            "global_step",
            "variables",
            "fragment_size_bytes",
            "contributors",
            "counted",
            "boot_id",
            "outer",
            "frozen_digests",
        ]
    ),
    st.none() | _JSON.map(json.dumps),
)
@fast
def test_a_file_whose_fields_say_anything_else_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: str | None
) -> None:
    path = write_fresh(tmp_path_factory.getbasetemp(), small())
    fields = about(path)
    fields.pop(name, None)
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
        ({"frozen_digests": "not hex"}, "damaged"),
        ({"frozen_digests": "0a 0B"}, "frozen_digests"),
        ({"frozen_digests": "00" * (MAX_FROZEN_BYTES + 1)}, "frozen_digests has 524289 bytes"),
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
