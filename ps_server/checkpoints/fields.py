"""The contents of a checkpoint besides the values, and their encoding in the file. Pure, except for the boot id.

A reader accepts exactly what a server writes and refuses everything else.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelaverage.checks import INCARNATION_BYTES, STEP_LIMIT, check_incarnation, check_worker_id
from modelaverage.codecs import CODECS, RAW, Codec
from modelaverage.manifest import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_FRAGMENT_SIZE_BYTES,
    Manifest,
    Part,
    Shard,
    Variable,
    dtype_name,
)
from modelaverage.names import listed
from modelaverage.outer import AVERAGE, OuterOptimizer, outer_optimizer, text_of
from modelaverage.outer.base import slots_of, summed_in
from modelaverage.runtime.shared_memory import Segment
from modelaverage.wire import check_sendable
from ps_server.checkpoints import strict_json
from ps_server.checkpoints.safetensors_file import Head, Tensor

__all__ = ["Checkpoint", "CheckpointError", "Content", "boot_id", "content_of", "fields_of"]

_FORMAT = "modelaverage.center.v1"
_FIELDS = ("global_step", "variables", "fragment_size_bytes", "contributors", "counted", "boot_id")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Bounds on the number of workers that a round remembers, and that one round may have.
_MAX_COUNTED, _MAX_CONTRIBUTORS = 10_000, 1 << 16
_MAX_PUSH_ID, _MAX_PART_INDEX = 2**64 - 1, 2**32 - 1


class CheckpointError(Exception):
    """A file is not a complete checkpoint of this project; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A stored center, and what a server needs to continue from it.

    Args:
        manifest: describes the variables and their fragments.
        arrays: the center variables by name, in manifest order.
        global_step: the number of completed rounds.
        contributors: the workers in the last round.
        counted: by worker, the key (incarnation, push id) of its last counted push.
        finished: workers that no round waits for, in any order.
        segment: the shared memory whose body is the flat buffer with the arrays; None: private memory.
        outer: the outer optimizer that computes the next centers.
        state: its state for this center, by slot and variable; see `ps_server.center.state.OuterState`.
        codec: the codec of the job.
        center_id: names the bits of the center; 0 with the codec `raw`.
    """

    manifest: Manifest
    arrays: Mapping[str, NDArray[Any]]
    global_step: int
    contributors: tuple[str, ...] = ()
    counted: Mapping[str, tuple[bytes, int]] | None = None
    finished: Collection[str] = ()
    segment: Segment | None = None
    outer: OuterOptimizer = AVERAGE
    state: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    codec: Codec = RAW
    center_id: int = 0

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays of the file by their names in it: the variables first, in manifest order."""
        tensors = dict(self.arrays)
        if self.state:
            prefix = _state_prefix(self.arrays)
            for slot, by_variable in self.state.items():
                tensors.update({f"{prefix}{slot}/{name}": array for name, array in by_variable.items()})
        return tensors


def _state_prefix(variables: Collection[str]) -> str:
    """A prefix for the names of state tensors that no variable's name begins with."""
    taken = {len(name) - len(rest) for name in variables if (rest := name.lstrip("_")).startswith("outer/")}
    return "_" * next(count for count in itertools.count() if count not in taken) + "outer/"


def boot_id() -> str:
    """The id of this boot of this machine; "unknown" on systems without one. Raises OSError: it cannot be read."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def fields_of(checkpoint: Checkpoint, boot: str) -> dict[str, str]:
    """The metadata of a checkpoint's file; ``boot`` is the id of the current boot."""
    fields = {
        "format": _FORMAT,
        "global_step": str(checkpoint.global_step),
        "variables": json.dumps(list(checkpoint.arrays)),
        "fragment_size_bytes": str(checkpoint.manifest.fragment_size_bytes),
        "contributors": json.dumps(checkpoint.contributors),
        "counted": json.dumps({w: [key.hex(), number] for w, (key, number) in (checkpoint.counted or {}).items()}),
        "finished": json.dumps(sorted(checkpoint.finished)),
        "boot_id": boot,
    }
    if checkpoint.outer != AVERAGE:
        fields["outer"] = text_of(checkpoint.outer)
    if checkpoint.codec is not RAW:
        fields["compression"] = checkpoint.codec.name
        fields["center_id"] = str(checkpoint.center_id)
    if checkpoint.manifest.frozen_digests:
        fields["frozen_digests"] = checkpoint.manifest.frozen_digests.hex()
    shard = checkpoint.manifest.shard
    if shard is not None:
        parts = [variable.part for variable in checkpoint.manifest.variables]
        fields["shard"] = json.dumps([shard.index, shard.count, shard.job_id.hex()])
        fields["parts"] = json.dumps([[part.variable, part.start, part.shape] for part in parts if part is not None])
    return fields


@dataclass(frozen=True)
class Content:
    """The fields of a center in a file's head; see Checkpoint.

    Args:
        manifest: the manifest of the center.
        contributors: the workers in the last round.
        counted: by worker, its last counted push.
        finished: workers that no round waits for.
        outer: the outer optimizer.
        state: by slot and variable, the name of the tensor that holds it.
        codec: the codec of the job.
        center_id: names the bits of the center; 0 with the codec `raw`.
    """

    manifest: Manifest
    contributors: tuple[str, ...]
    counted: dict[str, tuple[bytes, int]]
    finished: frozenset[str]
    outer: OuterOptimizer
    state: dict[str, dict[str, str]]
    codec: Codec
    center_id: int


def content_of(head: Head, step: int, is_fresh: bool) -> Content:
    """Parses the head of a file whose name is that of this step.

    Raises:
        CheckpointError, ValueError, ModelAverageError: the head contains something that no server writes.
        OSError: this boot's id cannot be read.
    """
    about = head.about
    if about.get("format") != _FORMAT:
        raise CheckpointError("it was not written by ps-server")
    missing = [name for name in _FIELDS if name not in about]
    if missing:
        raise ValueError(f"it does not say {', '.join(missing)}")
    if is_fresh and about["boot_id"] != boot_id():
        raise CheckpointError("it may not have reached the disk before the machine went down")
    if strict_json.whole_number_in_text(about["global_step"], "global_step", 0, STEP_LIMIT - 1) != step:
        raise CheckpointError(f"its name is not that of global_step {about['global_step']}")
    fragment_size_bytes = strict_json.whole_number_in_text(
        about["fragment_size_bytes"], "fragment_size_bytes", 0, MAX_FRAGMENT_SIZE_BYTES
    )
    names = strict_json.list_of(strict_json.parse(about["variables"]), "variables", len(head.tensors), _name)
    outer = _outer_of(about)
    state = _state_of(outer, names, head.tensors)
    if sorted([*names, *(each for by_variable in state.values() for each in by_variable.values())]) != sorted(
        head.tensors
    ):
        raise CheckpointError("its list of variables does not match its tensors")
    shard, parts = _shard_of(about, len(names))
    variables = tuple(
        Variable(name, head.tensors[name].dtype, head.tensors[name].shape, part)
        for name, part in zip(names, parts, strict=True)
    )
    contributors = strict_json.list_of(
        strict_json.parse(about["contributors"]), "contributors", _MAX_CONTRIBUTORS, _worker_id
    )
    if len(set(contributors)) != len(contributors):
        raise ValueError("contributors names a worker twice")
    counted = strict_json.map_of(strict_json.parse(about["counted"]), "counted", _MAX_COUNTED, _counted)
    # Files of earlier versions lack this field.
    finished = strict_json.list_of(strict_json.parse(about.get("finished", "[]")), "finished", _MAX_COUNTED, _worker_id)
    # bytes.fromhex would pass over spaces.
    frozen_digests = bytes.fromhex(about.get("frozen_digests", ""))
    if frozen_digests.hex() != about.get("frozen_digests", ""):
        raise ValueError("no server writes its frozen_digests so")
    manifest = Manifest(variables, fragment_size_bytes, shard, frozen_digests)
    check_sendable(manifest)
    codec, center_id = _codec_of(about)
    return Content(manifest, tuple(contributors), counted, frozenset(finished), outer, state, codec, center_id)


def _outer_of(about: Mapping[str, str]) -> OuterOptimizer:
    """The outer optimizer that a file names; `average` if it names none."""
    if "outer" not in about:
        return AVERAGE
    try:
        outer = outer_optimizer(about["outer"])
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if text_of(outer) != about["outer"] or outer == AVERAGE:
        raise ValueError(f"no server writes its outer optimizer as {about['outer']!a}")
    return outer


def _codec_of(about: Mapping[str, str]) -> tuple[Codec, int]:
    """The codec of the job and the center's id; `raw` and 0 if a file names none."""
    if ("compression" in about) != ("center_id" in about):
        raise ValueError("it says compression or center_id, but not both")
    if "compression" not in about:
        return RAW, 0
    codec = CODECS.get(about["compression"])
    if codec is None:
        raise CheckpointError(
            f"its compression {about['compression'][:40]!a} is not known here, only {listed(list(CODECS))}"
        )
    if codec is RAW:
        raise ValueError("no server writes the compression raw")
    return codec, strict_json.whole_number_in_text(about["center_id"], "center_id", 0, _MAX_PUSH_ID)


def _state_of(
    outer: OuterOptimizer, names: Collection[str], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """The tensors with the outer optimizer's state. Raises CheckpointError if they do not fit the optimizer."""
    state, prefix = dict[str, dict[str, str]](), _state_prefix(names)
    for name in names:
        if name not in tensors:
            raise CheckpointError("its list of variables does not match its tensors")
        dtype = DTYPES[tensors[name].dtype]
        for slot in slots_of(outer, dtype):
            found = tensors.get(key := f"{prefix}{slot}/{name}")
            if found is None:
                raise CheckpointError(
                    f"outer optimizer {outer.name} keeps {slot} of every variable; there is none of {name!a}"
                )
            expected = dtype_name(summed_in(dtype)), tensors[name].shape
            if (found.dtype, found.shape) != expected:
                raise CheckpointError(
                    f"{slot} of variable {name!a} is {found.dtype}{list(found.shape)}; outer optimizer {outer.name} "
                    f"needs {expected[0]}{list(expected[1])}"
                )
            state.setdefault(slot, {})[name] = key
    return state


def _name(value: Any) -> str:
    return strict_json.text(value, "the name of a variable")


def _worker_id(value: Any) -> str:
    worker_id = strict_json.text(value, "worker id")
    check_worker_id(worker_id)
    return worker_id


def _counted(worker_id: str, value: Any) -> tuple[bytes, int]:
    _worker_id(worker_id)
    key = strict_json.list_of(value, "what was counted", 2, lambda each: each)
    if len(key) != 2:
        raise ValueError(f"what was counted of {worker_id!a} is not an incarnation and push id")
    incarnation = _from_hex(key[0], "incarnation")
    check_incarnation(incarnation)
    return incarnation, strict_json.whole_number(key[1], "push id", 0, _MAX_PUSH_ID)


def _from_hex(value: Any, what: str) -> bytes:
    """16 bytes, as `bytes.hex` writes them."""
    shown = strict_json.text(value, what)
    found = bytes.fromhex(shown) if len(shown) == 2 * INCARNATION_BYTES else b""
    if found.hex() != shown:
        raise ValueError(f"{what} is not {INCARNATION_BYTES} bytes in hexadecimal")
    return found


def _shard_of(about: Mapping[str, str], num_variables: int) -> tuple[Shard | None, list[Part | None]]:
    if ("shard" in about) != ("parts" in about):
        raise ValueError("it says shard or parts, but not both")
    if "shard" not in about:
        return None, [None] * num_variables
    fields = strict_json.list_of(strict_json.parse(about["shard"]), "shard", 3, lambda each: each)
    if len(fields) != 3:
        raise ValueError("shard is not an index, count and job id")
    index, count = (strict_json.whole_number(each, "shard", 0, _MAX_PART_INDEX) for each in fields[:2])
    parts = strict_json.list_of(strict_json.parse(about["parts"]), "parts", num_variables, _part)
    return Shard(index, count, _from_hex(fields[2], "job id")), list(parts)


def _part(value: Any) -> Part:
    fields = strict_json.list_of(value, "a part", 3, lambda each: each)
    if len(fields) != 3:
        raise ValueError("a part is not a variable, start and shape")
    variable = strict_json.whole_number(fields[0], "variable", 0, _MAX_PART_INDEX)
    start = strict_json.whole_number(fields[1], "start", 0, STEP_LIMIT - 1)
    shape = strict_json.list_of(fields[2], "shape", MAX_DIMENSIONS, _extent)
    return Part(variable, start, tuple(shape))


def _extent(value: Any) -> int:
    return strict_json.whole_number(value, "extent", 0, STEP_LIMIT - 1)
