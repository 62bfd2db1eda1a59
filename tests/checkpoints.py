"""Checkpoints for tests: made by hand, written and read by path, and writers that fail at a chosen place."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import Manifest, Variable, dtype_name
from modelaverage.runtime.shared_memory import Segment
from ps_server.checkpoints import files
from ps_server.checkpoints import reading as checkpoint
from ps_server.checkpoints.fields import Checkpoint, boot_id, fields_of
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from ps_server.checkpoints.safetensors_file import bytes_of, lay_out
from tests.jobs import CENTER, STEP

__all__ = [
    "checkpoint_of",
    "content",
    "durable",
    "faulty_writer",
    "header_of",
    "in_segment",
    "is_durable",
    "make_durable",
    "opened_keeper",
    "prune",
    "read",
    "small",
    "steps",
    "write_file",
    "write_fresh",
    "writers_of",
]


def checkpoint_of(manifest: Manifest, seed: int = 0, global_step: int = STEP, **fields: Any) -> Checkpoint:
    """Any bytes at all, NaNs among them."""
    buffer = np.random.default_rng(seed).integers(0, 256, manifest.buffer_size_bytes, np.uint8)
    return Checkpoint(manifest, manifest.arrays(buffer), global_step, **fields)


def small(global_step: int = STEP, seed: int = 0) -> Checkpoint:
    """A checkpoint of the center of tests/jobs.py."""
    variables = tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in CENTER.items())
    counted = {"a": (b"0123456789abcdef", 7)}
    return checkpoint_of(Manifest(variables, 64), seed, global_step, contributors=("a", "b"), counted=counted)


def in_segment(checkpoint: Checkpoint) -> Checkpoint:
    """The same, in shared memory."""
    manifest = checkpoint.manifest
    segment = Segment.create(manifest.buffer_size_bytes, for_clients_to_write=False)
    arrays = manifest.arrays(segment.body)
    for name, array in arrays.items():
        array[...] = checkpoint.arrays[name]
    return dataclasses.replace(checkpoint, arrays=arrays, segment=segment)


# As the writer does it, by path.


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = files.open_directory(directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_file(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> Path:
    """A file with any arrays and metadata."""
    layout = lay_out(arrays, about)
    with _opened(path.parent) as directory:
        files.write(directory, path.name, [layout.head, *(bytes_of(arrays[name]) for name in layout.names)])
    return path


def write_fresh(directory: Path, written: Checkpoint) -> Path:
    """Its path."""
    return write_file(directory / files.fresh_name(written.global_step), written.tensors, fields_of(written, boot_id()))


def make_durable(fresh: Path) -> Path:
    """Its new path."""
    with _opened(fresh.parent) as directory:
        durable = files.make_durable(directory, fresh.name)
    assert durable is not None
    return fresh.with_name(durable)


def durable(directory: Path, global_step: int = STEP, seed: int = 0) -> Path:
    """A small one, made durable."""
    return make_durable(write_fresh(directory, small(global_step, seed)))


def prune(newest: Path, keep: int) -> None:
    """Prunes, as is done after ``newest`` was made durable."""
    with _opened(newest.parent) as directory:
        files.prune(directory, newest.name, keep)


def read(path: Path, max_model_bytes: int | None = None) -> Checkpoint:
    """Raises CheckpointError, or OSError."""
    with _opened(path.parent) as directory:
        return checkpoint.read(directory, path.name, max_model_bytes)


# What is there.


def header_of(path: Path) -> dict[str, Any]:
    """The JSON of a file's head."""
    whole = path.read_bytes()
    header: dict[str, Any] = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return header


def content(found: Checkpoint) -> object:
    """The checkpoint as values that can be compared."""
    arrays = [(name, a.dtype, a.shape, a.tobytes()) for name, a in found.tensors.items()]
    outer = found.outer.name, dict(found.outer.settings)
    return found.manifest, arrays, found.global_step, found.contributors, found.counted, outer


def steps(directory: Path) -> list[int]:
    """The steps of all checkpoints, fresh or durable."""
    return sorted(int(path.name.split(".")[0].removeprefix("center-")) for path in directory.glob("*.safetensors"))


def is_durable(directory: Path, global_step: int) -> bool:
    """Whether there is a durable one of this step."""
    return any(".fresh." not in path.name for path in directory.glob(f"center-{global_step:020d}.*.safetensors"))


# Who writes.


@contextmanager
def opened_keeper(policy: CheckpointPolicy) -> Iterator[Keeper]:
    """A keeper and its directory, until the end."""
    home = CheckpointHome(policy.directory)
    try:
        keeper = Keeper(policy, home)
        try:
            yield keeper
        finally:
            keeper.close()
    finally:
        home.close()


def faulty_writer(fault: str) -> Any:
    """A substitute for `writer_process.command`: checkpoint writers that first run ``fault``, Python that
    may change what is in ``files`` and ``writer``."""

    def command(parent: int) -> list[str]:
        run = (
            "import errno, os, signal, sys, time\n"
            "sys.path.append(sys.argv.pop())\n"
            "from ps_server.checkpoints import files, writer\n"
            f"{fault}\n"
            "writer.main()"
        )
        root = str(Path(__file__).parents[1])
        return [sys.executable, "-I", "-S", "-B", "-c", run, str(parent), root]

    return command


def writers_of(server: int) -> list[int]:
    """The ids of the living checkpoint writers that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if int(parent) == server and state != "Z" and b"checkpoints.writer" in command:
            found.append(int(entry.name))
    return sorted(found)
