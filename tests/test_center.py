"""The arithmetic of the center: averages against numpy in double precision, untouched variables, sizes, memory."""

from __future__ import annotations

import threading
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.codecs import RAW
from modelaverage.errors import ProtocolError, Reason
from modelaverage.manifest import DTYPES, Manifest, Variable
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution
from tests.centers import (
    ALL_DTYPES,
    SEEDS,
    Arrays,
    Pushed,
    arrivals,
    average,
    center_of,
    commit,
    everything,
    fragment,
    random_arrays,
    random_bits,
    random_center,
    random_push,
    read,
    whole_round,
)
from tests.strategies import fast, manifests

# Rounding error of one operation, and the smallest number, in what is stored and in what is summed.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 5e-324, "float32": 1.5e-45, "float16": 6e-8, "bfloat16": 1e-40}


# Values.


@fast
@given(
    manifests(min_elements=1),
    st.lists(st.sampled_from([1.0, 0.5, 3.0, 0.1, 1e-9, 7.25e4]), min_size=1, max_size=4),
    SEEDS,
)
def test_the_average_is_numpys_in_double_precision_up_to_rounding(
    manifest: Manifest, weights: list[float], seed: int
) -> None:
    chance = np.random.default_rng(seed)
    pushes = [random_push(chance, manifest, weight) for weight in weights]
    center = random_center(manifest, chance)
    whole_round(center, *pushes, seed=seed)
    for variable in manifest.variables:
        values = np.stack([push.values[variable.name].astype(np.longdouble) for push in pushes])
        shares = np.array(weights, np.longdouble).reshape(-1, *[1] * len(variable.shape)) / np.sum(weights)
        exact, size = np.sum(values * shares, axis=0), np.sum(np.abs(values) * shares, axis=0)
        summed_in = "float64" if variable.dtype == "float64" else "float32"
        bound = (
            size * ROUNDING[summed_in] * (len(pushes) + 5)
            + np.abs(exact) * ROUNDING[variable.dtype] * 1.01
            + SMALLEST[variable.dtype]
        )
        assert np.all(np.abs(read(center)[variable.name].astype(np.longdouble) - exact) <= bound)


@fast
@given(manifests(min_elements=1), st.tuples(st.sampled_from([1.0, 0.3]), st.sampled_from([1.0, 1e3])), SEEDS)
def test_the_average_of_two_is_bit_for_bit_the_same_in_any_order_of_arrival(
    manifest: Manifest, weights: tuple[float, float], seed: int
) -> None:
    chance = np.random.default_rng(seed)
    pushes = [random_push(chance, manifest, weight) for weight in weights]
    results = set()
    for _ in range(3):
        center = Center(manifest)
        shared = [bool(chance.integers(2)) for _ in pushes]
        average(center, pushes, arrivals(2, manifest.fragment_count, chance), shared)
        commit(center)
        results.add(everything(center.current))
    assert len(results) == 1


@fast
@given(manifests(min_elements=1), st.sampled_from([1, 2, 4]), SEEDS)
def test_values_that_are_equal_on_one_two_or_four_workers_do_not_change_by_a_bit(
    manifest: Manifest, num_workers: int, seed: int
) -> None:
    values = random_arrays(manifest, np.random.default_rng(seed))
    center = center_of(manifest, values)
    before = everything(center.current)
    for _ in range(3):
        whole_round(center, *[Pushed(read(center))] * num_workers)
    assert everything(center.current) == before


@fast
@given(SEEDS)
def test_values_that_are_equal_on_three_workers_change_by_one_rounding_at_most_and_do_not_drift(seed: int) -> None:
    # For a sixth of all x, (x + x + x) / 3 is the neighbour of x, which the next round does not change.
    values = random_arrays(ALL_DTYPES, np.random.default_rng(seed))
    center = center_of(ALL_DTYPES, values)
    whole_round(center, *[Pushed(values)] * 3)
    once = everything(center.current)
    for name in ("float32", "float64"):
        assert np.all(np.abs(read(center)[name] - values[name]) <= np.spacing(np.abs(values[name])))
    for name in ("float16", "bfloat16"):
        assert read(center)[name].tobytes() == values[name].tobytes(), "a sum of these is exact"
    for _ in range(5):
        whole_round(center, *[Pushed(read(center))] * 3)
        assert everything(center.current) == once


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_of_16_bit_values_does_not_overflow(dtype: str) -> None:
    manifest = Manifest((Variable("v", dtype, (2,)),), 8)
    largest = np.array([65504.0, -65504.0]).astype(DTYPES[dtype])
    center = Center(manifest)
    assert whole_round(center, *[Pushed({"v": largest}, weight=1e6)] * 3) == 0
    assert read(center)["v"].tobytes() == largest.tobytes()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
def test_16_bit_values_are_summed_in_float32_wherever_they_lie(shared: bool, workers: int) -> None:
    manifest = Manifest((Variable("f", "float16", (2,)), Variable("b", "bfloat16", (2,))), 16)
    values: Arrays = {"f": np.full(2, 65504, np.float16), "b": np.array([1, 1.0078125]).astype(DTYPES["bfloat16"])}
    center = Center(manifest)
    order = arrivals(workers, manifest.fragment_count, np.random.default_rng(0))
    average(center, [Pushed(values)] * workers, order, [shared] * workers)
    commit(center)
    assert {name: array.tobytes() for name, array in read(center).items()} == {
        name: array.tobytes() for name, array in values.items()
    }


def test_the_sum_of_16_bit_values_is_rounded_once() -> None:
    # 1 + 2**-11 rounds to 1 in float16: summed there, both small ones would be lost.
    manifest = Manifest((Variable("v", "float16", ()),), 8)
    pushes = [Pushed({"v": np.array(value, np.float16)}) for value in (1.0, 2.0**-11, 2.0**-11, 0.0)]
    center = Center(manifest)
    whole_round(center, *pushes)
    assert read(center)["v"] == np.float16((1 + 2.0**-10) / 4)


@fast
@given(SEEDS)
def test_values_that_are_not_finite_are_averaged_as_they_are_and_counted(seed: int) -> None:
    chance = np.random.default_rng(seed)
    pushes = []
    expected = 0
    for _ in range(int(chance.integers(1, 4))):
        values = random_arrays(ALL_DTYPES, chance)
        for array in values.values():
            places = chance.choice(array.size, int(chance.integers(0, 4)), replace=False)
            array[places] = chance.choice([np.inf, -np.inf, np.nan], places.size).astype(array.dtype)
            expected += places.size
        pushes.append(Pushed(values, float(chance.choice([1.0, 2.0]))))
    center = Center(ALL_DTYPES)
    assert whole_round(center, *pushes, seed=seed) == expected
    for name, got in read(center).items():
        with np.errstate(invalid="ignore"):
            exact = sum(push.values[name].astype(np.float64) * push.weight for push in pushes)
        special = ~np.isfinite(np.asarray(exact))
        np.testing.assert_array_equal(got[special].astype(np.float64), np.asarray(exact)[special])
        assert np.all(np.isfinite(got[~special].astype(np.float64)))


def test_finite_values_are_not_counted_although_their_sum_overflows() -> None:
    manifest = Manifest((Variable("v", "float32", (4,)), Variable("h", "float16", (4,))), 16)
    values: Arrays = {"v": np.full(4, 3e38, np.float32), "h": np.full(4, 65504, np.float16)}
    assert whole_round(Center(manifest), Pushed(values)) == 0


def test_values_that_are_not_finite_leave_their_neighbours_alone() -> None:
    manifest = Manifest((Variable("v", "float32", (4,)), Variable("w", "float32", (2,))), 16)
    one = {"v": np.array([np.nan, 1, np.inf, 3], np.float32), "w": np.array([1, 2], np.float32)}
    center = Center(manifest)
    assert whole_round(center, Pushed(one), Pushed({name: np.zeros_like(one[name]) for name in one})) == 2
    np.testing.assert_array_equal(read(center)["v"], np.array([np.nan, 0.5, np.inf, 1.5], np.float32))
    np.testing.assert_array_equal(read(center)["w"], np.array([0.5, 1], np.float32))


# Untouched variables.


@fast
@given(manifests(min_elements=1), SEEDS)
def test_untouched_variables_keep_the_bytes_of_the_center_whatever_was_pushed(manifest: Manifest, seed: int) -> None:
    chance = np.random.default_rng(seed)
    untouched = frozenset(number for number in range(len(manifest.variables)) if chance.random() < 0.5)
    before = random_bits(manifest, chance)
    center = center_of(manifest, before)
    pushes = [Pushed(random_arrays(manifest, chance), untouched=untouched) for _ in range(2)]
    whole_round(center, *pushes, seed=seed)
    plain = Center(manifest)
    whole_round(plain, *[Pushed(push.values) for push in pushes], seed=seed)
    for number, variable in enumerate(manifest.variables):
        kept = before if number in untouched else read(plain)
        assert read(center)[variable.name].tobytes() == kept[variable.name].tobytes()


def test_a_variable_can_be_untouched_in_one_round_and_averaged_in_the_next() -> None:
    manifest = Manifest((Variable("a", "float16", (3,)), Variable("b", "float32", ())), 8)
    ones: Arrays = {"a": np.ones(3, np.float16), "b": np.ones((), np.float32)}
    fives: Arrays = {"a": np.full(3, 5, np.float16), "b": np.full((), 5, np.float32)}
    center = center_of(manifest, ones)
    whole_round(center, Pushed(fives, untouched=frozenset({0})))
    assert (read(center)["a"].tolist(), float(read(center)["b"])) == ([1, 1, 1], 5)
    whole_round(center, Pushed(fives))
    assert read(center)["a"].tolist() == [5, 5, 5]


# Threads, memory, sizes.


def test_where_no_thread_can_be_started_fragments_are_averaged_without(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest((Variable("w", "float32", (64,)),), 16)
    values = {"w": np.arange(64, dtype=np.float32)}
    center = Center(manifest)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for index in range(manifest.fragment_count):
        center.accumulate(index, Contribution("a", 1.0, fragment(manifest, values, index)), first=True)
    center.finish([Finish(index, 2.0, frozenset()) for index in range(manifest.fragment_count)])
    commit(center)
    np.testing.assert_array_equal(read(center)["w"], values["w"] / 2)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("shared", [False, True])
def test_a_round_allocates_nothing_of_the_size_of_the_model(shared: bool) -> None:
    manifest = Manifest(tuple(Variable(name, name, (100_000,)) for name in sorted(DTYPES)), 1 << 14)
    values = {name: np.ones(100_000, DTYPES[name]) for name in DTYPES}
    fragments = [fragment(manifest, values, index) for index in range(manifest.fragment_count)]
    center = Center(manifest)
    give = center.defer if shared else center.accumulate
    tracemalloc.start()
    try:
        for index, data in enumerate(fragments):
            give(index, Contribution("a", 2.0, data), first=True)
            give(index, Contribution("b", 3.0, data), first=False)
            center.finish([Finish(index, 5.0, frozenset())])
        commit(center)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < manifest.size_bytes / 10
    assert all(np.all(array == np.ones((), array.dtype)) for array in read(center).values())


@pytest.mark.parametrize("size_bytes", [0, 63, 65, 128])
def test_a_fragment_of_the_wrong_size_is_refused_and_changes_nothing(size_bytes: int) -> None:
    center = random_center()
    before = everything(center.current)
    for refuse in (partial(RAW.check_size, center.manifest), center.load):
        with pytest.raises(
            ProtocolError, match=f"fragment 0 has {size_bytes} bytes; the manifest gives it 64"
        ) as error:
            refuse(0, memoryview(bytes(size_bytes)))
        assert error.value.reason is Reason.FRAGMENT_SIZE_WRONG
    assert everything(center.current) == before


def test_what_was_loaded_is_what_is_read_and_padding_is_zero() -> None:
    manifest = Manifest((Variable("a", "float16", (3,)), Variable("b", "float32", ())), 8)
    center = Center(manifest)
    center.load(0, memoryview(b"abcdefXX"))
    center.load(1, memoryview(b"ghij"))
    assert everything(center.current) == b"abcdef\0\0ghij"
