"""A fragment of one element type is summed as one array: the bits are those of sums variable by variable."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, Manifest, Variable
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution
from ps_server.center.uniform import uniform_fragments

WEIGHTS = (1.0, 2.5, 0.1)


def model_of(dtype: str) -> Manifest:
    """Variables with odd sizes, so that there is padding; some lie in two fragments."""
    sizes = (5, 1, 700, 0, 3, 129, 2, 301)
    return Manifest(tuple(Variable(f"v{i}", dtype, (size,)) for i, size in enumerate(sizes)), 512)


def filled(manifest: Manifest, chance: np.random.Generator, junk: bool = False) -> NDArray[np.uint8]:
    """A flat buffer with values; what is not one is zero, or ``junk``: 0xff, which is NaN in every type."""
    flat = np.full(manifest.buffer_size_bytes, 0xFF if junk else 0, np.uint8)
    for array in manifest.arrays(flat).values():
        array[...] = chance.standard_normal(array.shape).astype(array.dtype)
    return flat


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_average_is_that_of_each_variable_whatever_arrives_as_padding(dtype: str, deferred: bool) -> None:
    manifest, chance = model_of(dtype), np.random.default_rng(0)
    assert None not in uniform_fragments(manifest)
    values = [filled(manifest, chance, junk=True) for _ in WEIGHTS]
    center = Center(manifest)
    nonfinite = 0
    for index in range(manifest.fragment_count):
        start, end = manifest.fragment_bounds(index)
        give = center.defer if deferred else center.accumulate
        for number, (flat, weight) in enumerate(zip(values, WEIGHTS, strict=True)):
            contribution = Contribution(f"w{number}", weight, flat[start:end].data)
            nonfinite += sum(give(index, contribution, first=number == 0).values())
        nonfinite += sum(center.finish([Finish(index, sum(WEIGHTS))]).values())
    assert nonfinite == 0
    summed = np.float64 if dtype == "float64" else np.float32
    expected = np.zeros(manifest.buffer_size_bytes, np.uint8)
    by_worker = [manifest.arrays(flat) for flat in values]
    for name, array in manifest.arrays(expected).items():
        total = np.zeros(array.shape, summed)
        for number, (arrays, weight) in enumerate(zip(by_worker, WEIGHTS, strict=True)):
            weighted = arrays[name].astype(summed) * summed(weight)
            total = weighted if number == 0 else total + weighted
        array[...] = (total / summed(sum(WEIGHTS))).astype(array.dtype)
    assert center.next.flat.tobytes() == expected.tobytes()  # padding is zero


@pytest.mark.parametrize("deferred", [True, False])
def test_values_that_are_not_finite_are_counted_without_padding(deferred: bool) -> None:
    manifest, chance = model_of("float32"), np.random.default_rng(0)
    values = [filled(manifest, chance, junk=True) for _ in range(2)]
    manifest.arrays(values[1])["v0"][:2] = np.nan, np.inf
    center, start_end = Center(manifest), manifest.fragment_bounds(0)
    counts = dict.fromkeys(("w0", "w1"), 0)
    for number, flat in enumerate(values):
        give = center.defer if deferred else center.accumulate
        contribution = Contribution(f"w{number}", 1.0, flat[slice(*start_end)].data)
        for worker, count in give(0, contribution, first=number == 0).items():
            counts[worker] += count
    for worker, count in center.finish([Finish(0, 2.0)]).items():
        counts[worker] += count
    assert counts == {"w0": 0, "w1": 2}


def test_an_untouched_variable_keeps_its_bytes_within_a_uniform_fragment() -> None:
    manifest, chance = model_of("bfloat16"), np.random.default_rng(0)
    center = Center(manifest)
    before = filled(manifest, chance)
    for index in range(manifest.fragment_count):
        center.load(index, before[slice(*manifest.fragment_bounds(index))].data)
    values = filled(manifest, chance)
    for index in range(manifest.fragment_count):
        data = values[slice(*manifest.fragment_bounds(index))].data
        center.accumulate(index, Contribution("w0", 1.0, data), first=True)
        center.finish([Finish(index, 1.0, untouched=frozenset({1, 5}))])
    for number, (name, array) in enumerate(manifest.arrays(center.next.flat).items()):
        assert array.tobytes() == manifest.arrays(before if number in (1, 5) else values)[name].tobytes()


def test_a_fragment_of_two_types_is_not_uniform() -> None:
    mixed = Manifest((Variable("a", "float32", (4,)), Variable("b", "float64", (100,))), 64)
    first, *others = uniform_fragments(mixed)
    assert first is None
    assert all(other is not None and other.dtype == np.float64 for other in others)
    assert np.dtype(ml_dtypes.bfloat16) == DTYPES["bfloat16"]
