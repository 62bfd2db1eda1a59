"""The center on disk: safetensors files that outlive the server. Files only; when they are written is keeper.py's.

A checkpoint is first *fresh*: whole, but perhaps only in the kernel's memory. That is enough for a server that is
killed, and it costs no wait for the disk; after a reboot fresh files are not trusted. Then it is made *durable*:
flushed to the disk and renamed to a name that carries a checksum of its bytes.

    center-00000000000000000012.fresh.safetensors       written in this boot of this machine
    center-00000000000000000012.5f3a9c1b.safetensors    on the disk, whose CRC-32 is 5f3a9c1b
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from modelaverage.checks import check_global_step
from modelaverage.errors import ModelAverageError
from modelaverage.logs import event
from modelaverage.manifest import ALIGNMENT_BYTES, Manifest, Part, Shard, Variable, dtype_name

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_latest",
    "load_latest",
    "make_durable",
    "prune",
    "read",
    "save",
    "write_fresh",
]

_log = logging.getLogger("ps_server")
_FORMAT = "modelaverage.center.v1"
_NAME = re.compile(r"center-(\d{20})\.(fresh|[0-9a-f]{8})\.safetensors")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BLOCK_BYTES = 1 << 20
# What reading fields that say something else may raise.
_FOREIGN_CONTENT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# safetensors' names.
_METADATA = "__metadata__"
_TENSOR_TYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}


class CheckpointError(Exception):
    """A file is not a whole checkpoint of this project; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A center at rest, and what a server needs to go on from it.

    Args:
        manifest: what the variables are, and how they are cut.
        arrays: the center variables by name, in manifest order.
        global_step: rounds completed.
        contributors: of the last round.
        counted: by worker, the key (incarnation, push id) of the last push that was counted.
    """

    manifest: Manifest
    arrays: Mapping[str, NDArray[Any]]
    global_step: int
    contributors: tuple[str, ...] = ()
    counted: Mapping[str, tuple[bytes, int]] | None = None


def write_fresh(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes a fresh checkpoint beside the others, and renames it when it is whole. Raises OSError."""
    about = {
        "format": _FORMAT,
        "global_step": str(checkpoint.global_step),
        "variables": json.dumps(list(checkpoint.arrays)),
        "fragment_size_bytes": str(checkpoint.manifest.fragment_size_bytes),
        "contributors": json.dumps(checkpoint.contributors),
        "counted": json.dumps({w: [key.hex(), number] for w, (key, number) in (checkpoint.counted or {}).items()}),
        "boot_id": _boot_id(),
        **_shard_to_fields(checkpoint.manifest),
    }
    path = directory / f"center-{checkpoint.global_step:020d}.fresh.safetensors"
    save(path, checkpoint.arrays, about)
    return path


def save(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
    """Writes a safetensors file beside ``path``, and renames it when it is whole. Raises OSError.

    By hand, because the library's writer makes a nameless file of its own, which stays behind when it is killed, lets
    nobody else read what it wrote, whatever the umask, and hides the number of an error.
    """
    if _METADATA in arrays:
        raise OSError(errno.EINVAL, f"a safetensors file cannot have a variable named {_METADATA}")
    # The widest elements first: so all of them are aligned, as readers expect.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {_METADATA: dict(about)}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        tensor_type = _TENSOR_TYPES[dtype_name(array.dtype)]
        header[name] = {"dtype": tensor_type, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, array in ordered:
                file.write(array.reshape(-1).view(np.uint8).data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def make_durable(fresh: Path) -> Path:
    """Flushes a fresh checkpoint to the disk and gives it its durable name. Raises OSError."""
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    durable = fresh.with_name(fresh.name.replace(".fresh.", f".{_checksum(fresh)}."))
    fresh.replace(durable)
    directory = os.open(fresh.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return durable


def prune(newest: Path, keep: int) -> None:
    """Removes what ``newest``, just made durable, leaves behind: fresh ones before it, and durable ones but for the
    ``keep`` - 1 before it. Those of later steps stay and do not count: who wrote ``newest`` had passed over them.
    """
    step = _step_of(newest)
    files = [path for path in _newest_first(newest.parent) if path.is_file() and path != newest]
    replaced = [path for path in files if _step_of(path) == step and not _is_fresh(path)]
    before = [path for path in files if _step_of(path) < step]
    durable = [path for path in before if not _is_fresh(path)]
    for path in replaced + durable[keep - 1 :] + [path for path in before if _is_fresh(path)]:
        path.unlink(missing_ok=True)


def load_latest(directory: Path) -> Checkpoint | None:
    """The newest usable checkpoint; None if there are none at all. Says in the log which it passed over, and why.

    Raises:
        CheckpointError: there are some, and none can be used: to begin anew is not for a server to decide.
        OSError: the directory cannot be read.
    """
    for unfinished in directory.glob("center-*.tmp"):
        with contextlib.suppress(OSError):
            unfinished.unlink()
    found, passed_over = find_latest(directory)
    for path, error in passed_over:
        why = event("checkpoint_passed_over", path=str(path), cause=str(error))
        _log.warning("checkpoint %s is passed over: %s", path, error, extra=why)
    if found is None:
        if passed_over:
            raise CheckpointError(
                f"none of its {len(passed_over)} checkpoints can be used; move them away to begin anew"
            )
        return None
    path, checkpoint = found
    step = checkpoint.global_step
    what = event("checkpoint_restored", path=str(path), round=step)
    _log.warning("going on from checkpoint %s, global_step %d", path, step, extra=what)
    return checkpoint


def find_latest(
    directory: Path, at_most: int | None = None
) -> tuple[tuple[Path, Checkpoint] | None, list[tuple[Path, Exception]]]:
    """The newest usable checkpoint, and which newer ones are not, and why. Changes nothing: a server may be at work
    there.

    Args:
        directory: where checkpoints lie.
        at_most: only of this `global_step` or before.

    Raises:
        OSError: the directory cannot be read.
    """
    passed_over = list[tuple[Path, Exception]]()
    for path in _newest_first(directory):
        if at_most is not None and _step_of(path) > at_most:
            continue
        try:
            return (path, read(path)), passed_over
        except (CheckpointError, OSError) as error:
            if not os.path.lexists(path):  # it has another name by now, or was overtaken
                return find_latest(directory, at_most)
            passed_over.append((path, error))
    return None, passed_over


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint, whole. Raises CheckpointError, or OSError."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError("its name is not that of a checkpoint")
    # First of all: where the disk is bad, this is an error, but looking into mapped memory would be the end.
    if match[2] != "fresh" and match[2] != _checksum(path):
        raise CheckpointError("its bytes are not those that were written")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise CheckpointError("it was not written by ps-server")
            if match[2] == "fresh" and about["boot_id"] != _boot_id():
                raise CheckpointError("it may not have reached the disk before the machine went down")
            names: list[str] = json.loads(about["variables"])
            if sorted(names) != sorted(file.keys()):
                raise CheckpointError("its list of variables is not that of its tensors")
            arrays = {name: file.get_tensor(name) for name in names}
            counted = json.loads(about["counted"])
            step = int(about["global_step"])
            check_global_step(step)
            if step != int(match[1]):
                raise CheckpointError(f"its name is not that of global_step {step}")
            shard, parts = _shard_from_fields(about, len(names))
            variables = tuple(
                Variable(name, dtype_name(array.dtype), array.shape, part)
                for (name, array), part in zip(arrays.items(), parts, strict=True)
            )
            return Checkpoint(
                Manifest(variables, int(about["fragment_size_bytes"]), shard),
                arrays,
                step,
                tuple(json.loads(about["contributors"])),
                {str(worker): (bytes.fromhex(key), int(number)) for worker, (key, number) in counted.items()},
            )
    except (safetensors.SafetensorError, ModelAverageError, *_FOREIGN_CONTENT) as error:
        raise CheckpointError(f"it is damaged ({error})") from None


def _shard_to_fields(manifest: Manifest) -> dict[str, str]:
    shard = manifest.shard
    if shard is None:
        return {}
    parts = [variable.part for variable in manifest.variables]
    return {
        "shard": json.dumps([shard.index, shard.count, shard.job_id.hex()]),
        "parts": json.dumps([[part.variable, part.start, part.shape] for part in parts if part is not None]),
    }


def _shard_from_fields(about: Mapping[str, str], num_variables: int) -> tuple[Shard | None, Sequence[Part | None]]:
    if "shard" not in about:
        return None, [None] * num_variables
    index, count, job_id = json.loads(about["shard"])
    parts = [Part(number, start, tuple(shape)) for number, start, shape in json.loads(about["parts"])]
    return Shard(index, count, bytes.fromhex(job_id)), parts


def _newest_first(directory: Path) -> list[Path]:
    # Of the same step the durable one comes first.
    named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (-_step_of(path), _is_fresh(path)))


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("center-"))


def _is_fresh(path: Path) -> bool:
    return ".fresh." in path.name


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"
