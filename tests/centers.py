"""Centers for tests: any values, pushes in any order of arrival, whole rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_client.transports.base import OutgoingPush
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.staging import Staging
from modelaverage.codecs import RAW
from modelaverage.manifest import DTYPES, Manifest, Variable
from ps_server.center.buffers import Buffer
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution

__all__ = [
    "ALL_DTYPES",
    "SEEDS",
    "Array",
    "Arrays",
    "Pushed",
    "arrivals",
    "average",
    "center_of",
    "commit",
    "everything",
    "fragment",
    "random_arrays",
    "random_bits",
    "random_center",
    "random_push",
    "read",
    "whole_round",
    "zeros",
]

Array = NDArray[Any]
Arrays = Mapping[str, Array]

SEEDS = st.integers(0, 2**32 - 1)
ALL_DTYPES = Manifest(tuple(Variable(name, name, (37,)) for name in sorted(DTYPES)), 64)


@dataclass
class Pushed:
    """A push as the center meets it."""

    values: Arrays
    weight: float = 1.0
    untouched: frozenset[int] = field(default_factory=frozenset)


def random_arrays(manifest: Manifest, chance: np.random.Generator, scale: float = 100.0) -> Arrays:
    return {
        variable.name: np.asarray(chance.normal(0.0, scale, variable.shape)).astype(DTYPES[variable.dtype])
        for variable in manifest.variables
    }


def random_bits(manifest: Manifest, chance: np.random.Generator) -> Arrays:
    """Values of every kind: also infinities, subnormal numbers and NaNs with payloads."""
    return manifest.arrays(np.frombuffer(bytearray(chance.bytes(manifest.buffer_size_bytes)), np.uint8))


def fragment(manifest: Manifest, values: Arrays, index: int) -> memoryview:
    """The bytes of a fragment as they lie in a message: at no particular address."""
    flat = [np.ascontiguousarray(values[v.name]).reshape(-1).view(np.uint8).data for v in manifest.variables]
    shift = index % 8
    return memoryview(b"".join([bytes(shift), *manifest.fragment_parts(index, flat)]))[shift:]


def center_of(manifest: Manifest, values: Arrays) -> Center:
    center = Center(manifest)
    for index in range(manifest.fragment_count):
        center.load(index, fragment(manifest, values, index))
    return center


def random_center(manifest: Manifest = ALL_DTYPES, chance: np.random.Generator | None = None) -> Center:
    return center_of(manifest, random_arrays(manifest, chance or np.random.default_rng(0)))


def random_push(chance: np.random.Generator | int, manifest: Manifest = ALL_DTYPES, weight: float = 1.0) -> Pushed:
    """A push of random values; ``chance`` may be a seed."""
    return Pushed(random_arrays(manifest, np.random.default_rng(chance)), weight)


def everything(buffer: Buffer) -> bytes:
    return buffer.flat.tobytes()


def commit(center: Center) -> None:
    center.commit(center.room(0.0), lambda: None)


def read(center: Center) -> Arrays:
    flat = bytearray(everything(center.current))
    return center.manifest.arrays(np.frombuffer(flat, np.uint8))


def arrivals(pushes: int, fragments: int, chance: np.random.Generator) -> list[int]:
    """Whose next fragment comes: any interleaving, in order for each worker."""
    order = [worker for worker in range(pushes) for _ in range(fragments)]
    return [int(worker) for worker in chance.permutation(order)]


def average(center: Center, pushes: Sequence[Pushed], order: Sequence[int], shared: Sequence[bool]) -> int:
    """One round, without its commit; how many values were not finite. ``shared`` ones lie in shared memory."""
    given, nonfinite = [0] * len(pushes), 0
    total_weight = sum(push.weight for push in pushes)
    untouched = frozenset.intersection(*(push.untouched for push in pushes))
    for worker in order:
        index, push = given[worker], pushes[worker]
        first = all(count <= index for count in given)
        data = fragment(center.manifest, push.values, index)
        give = center.defer if shared[worker] else center.accumulate
        nonfinite += give(index, Contribution(str(worker), push.weight, data), first).total()
        given[worker] += 1
        if all(count > index for count in given):
            nonfinite += center.finish([Finish(index, total_weight, untouched)]).total()
    return nonfinite


def whole_round(center: Center, *pushes: Pushed, seed: int = 0) -> int:
    chance = np.random.default_rng(seed)
    order = arrivals(len(pushes), center.manifest.fragment_count, chance)
    nonfinite = average(center, pushes, order, [bool(chance.integers(2)) for _ in pushes])
    commit(center)
    return nonfinite


def zeros(staging: Staging) -> OutgoingPush:
    """A raw push of zeros, number 1."""
    variables = [memoryview(bytes(variable.size_bytes)) for variable in staging.manifest.variables]
    return OutgoingPush(1, variables, staging, RAW, True, True, LinkBytes())
