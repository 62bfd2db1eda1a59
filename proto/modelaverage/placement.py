"""Distributes a model over several servers, and joins the parts again. Pure.

*Balanced* cuts the flat buffer into as many contiguous ranges of whole fragments as there are servers; a large variable
may be split. *Round robin* keeps variables whole and deals them out in manifest order, as TensorFlow 1.15's
``replica_device_setter`` does.

Only the chief needs to know the placement: every shard's manifest gives the position of its parts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import ConflictError, InvalidRequestError, ModelAverageError, Reason
from modelaverage.manifest import (
    ALIGNMENT_BYTES,
    DEFAULT_FRAGMENT_SIZE_BYTES,
    DTYPES,
    MAX_FRAGMENTS,
    Manifest,
    Part,
    Shard,
    Variable,
)

__all__ = ["PLACEMENTS", "assemble", "default_fragment_size_bytes", "gather", "place"]

PLACEMENTS = ("balanced", "round_robin")
# With several servers, as many streams share a worker's link; smaller fragments keep all of them busy to the end.
# docs/decisions/0014 has the measurements.
_SHARDED_FRAGMENT_SIZE_BYTES = 1 << 18


def default_fragment_size_bytes(buffer_size_bytes: int, num_shards: int, is_coded: bool = False) -> int:
    """The size of a fragment for a flat buffer of this size; small enough that each of several shards gets fragments.
    ``is_coded``: the job has a codec, in which fragments are smaller and a round needs fewer of them."""
    if num_shards == 1:
        return DEFAULT_FRAGMENT_SIZE_BYTES
    share, least = _aligned(buffer_size_bytes / num_shards), _aligned(buffer_size_bytes / MAX_FRAGMENTS)
    most = DEFAULT_FRAGMENT_SIZE_BYTES if is_coded else _SHARDED_FRAGMENT_SIZE_BYTES
    return max(ALIGNMENT_BYTES, least, min(share, most))


def place(manifest: Manifest, num_shards: int, placement: str, job_id: bytes) -> tuple[Manifest, ...]:
    """The manifest of every shard, in the order of the servers' addresses.

    Args:
        manifest: the manifest of the whole model.
        num_shards: how many servers share the model. A single server gets the manifest unchanged.
        placement: "balanced": contiguous ranges of fragments, whose numbers differ by one at most; "round_robin": whole
            variables, variable ``i`` on shard ``i % num_shards``.
        job_id: 16 random bytes that name the job.

    Raises:
        InvalidRequestError: there is no such placement, or MANIFEST_INVALID.
    """
    if placement not in PLACEMENTS:
        raise InvalidRequestError(f"there is no placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
    if num_shards == 1:
        return (manifest,)
    shards = _balanced(manifest, num_shards) if placement == "balanced" else _round_robin(manifest, num_shards)
    return tuple(
        Manifest(
            tuple(variables),
            manifest.fragment_size_bytes,
            Shard(index, num_shards, job_id),
            manifest.frozen_digests if index == 0 else b"",
        )
        for index, variables in enumerate(shards)
    )


def assemble(manifests: Sequence[Manifest], addresses: Sequence[str]) -> Manifest:
    """The manifest of the whole model, from those of its shards.

    Args:
        manifests: the manifest of every server, in the order in which the servers were given.
        addresses: the addresses of the servers, for error messages.

    Raises:
        ConflictError: MANIFEST_MISMATCH: they do not belong together; it names the first server that does not.
    """
    first = manifests[0].shard
    for position, (manifest, address) in enumerate(zip(manifests, addresses, strict=True)):
        problem = _stranger(manifest.shard, position, first, addresses)
        if problem is not None:
            raise _mismatch(f"the parameter server at {address} {problem}")
    if first is None:
        return manifests[0]
    first_shard = manifests[0]
    variables = _whole_variables(manifests)
    return Manifest(variables, first_shard.fragment_size_bytes, frozen_digests=first_shard.frozen_digests)


def gather(whole: Manifest, shards: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The variables of the whole model by name, in its order; views of variables that lie on one shard.

    Args:
        whole: the manifest from `assemble`.
        shards: every shard's variables by name.
    """
    arrays = dict[str, NDArray[Any]]()
    for variable in whole.variables:
        parts = [shard[variable.name] for shard in shards if variable.name in shard]
        arrays[variable.name] = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(variable.shape)
    return arrays


def _aligned(size_bytes: float) -> int:
    return math.ceil(size_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _balanced(manifest: Manifest, num_shards: int) -> list[list[Variable]]:
    cuts = [manifest.fragment_count * index // num_shards for index in range(num_shards)]
    starts = [cut * manifest.fragment_size_bytes for cut in cuts]
    shards: list[list[Variable]] = [[] for _ in starts]
    last_byte = max(0, manifest.buffer_size_bytes - 1)
    for number, (variable, offset) in enumerate(zip(manifest.variables, manifest.offsets_bytes, strict=True)):
        index = bisect_right(starts, min(offset, last_byte)) - 1  # an empty variable may start after the last byte
        itemsize = DTYPES[variable.dtype].itemsize
        start = 0
        for stop_bytes in (*starts[index + 1 :], offset + variable.size_bytes):
            stop = min(variable.size, (stop_bytes - offset) // itemsize)
            if start == 0 and stop == variable.size:
                shards[index].append(_part(variable, number))
            elif start < stop:
                shards[index].append(_part(variable, number, start, stop - start))
            if stop == variable.size:
                break
            start, index = stop, index + 1
    return shards


def _round_robin(manifest: Manifest, num_shards: int) -> list[list[Variable]]:
    parts = [_part(variable, number) for number, variable in enumerate(manifest.variables)]
    return [parts[index::num_shards] for index in range(num_shards)]


def _part(variable: Variable, number: int, start: int = 0, count: int | None = None) -> Variable:
    shape = variable.shape if count is None else (count,)
    return Variable(variable.name, variable.dtype, shape, Part(number, start, variable.shape))


def _stranger(shard: Shard | None, position: int, first: Shard | None, addresses: Sequence[str]) -> str | None:
    """Why a server does not belong with the given ones, or None."""
    given = f"{len(addresses)} {'addresses were' if len(addresses) > 1 else 'address was'} given"
    if shard is None:
        return None if len(addresses) == 1 else f"has a whole model, not a shard, but {given}"
    if shard.count != len(addresses):
        return f"is {shard}, but {given}; give all of them, in order"
    if first is None or shard.job_id != first.job_id:
        return f"is {shard}; the one at {addresses[0]} is {first or 'no shard'}"
    if shard.index != position:
        return f"is {shard}, but was given as number {position}; give the addresses in order"
    return None


def _whole_variables(manifests: Sequence[Manifest]) -> tuple[Variable, ...]:
    wholes, reached = dict[int, Variable](), dict[int, int]()
    for manifest in manifests:
        for variable in manifest.variables:
            part = variable.part
            assert part is not None
            whole = Variable(variable.name, variable.dtype, part.shape)
            if wholes.setdefault(part.variable, whole) != whole or part.start != reached.get(part.variable, 0):
                raise _mismatch(f"{manifest.shard} has {variable} for {variable.name!r}, which does not fit the others")
            reached[part.variable] = part.start + variable.size
    for number, whole in wholes.items():
        if reached[number] != whole.size:
            raise _mismatch(f"of {whole.name!r}, {whole}, no server has the elements from {reached[number]} on")
    if sorted(wholes) != list(range(len(wholes))):
        missing = next(number for number in range(len(wholes)) if number not in wholes)
        raise _mismatch(f"no server has variable {missing}")
    return tuple(wholes[number] for number in range(len(wholes)))


def _mismatch(message: str) -> ModelAverageError:
    return ConflictError(message, Reason.MANIFEST_MISMATCH)
