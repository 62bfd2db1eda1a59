"""The buffers of the center: averages against numpy in double precision, readers, memory."""

from __future__ import annotations

import contextlib
import threading
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelaverage.errors import ModelAverageError, ProtocolError, Reason
from modelaverage.manifest import DTYPES, Manifest, Variable
from ps_server.center.buffers import MAX_OLD_BUFFERS, Buffer, Center, Contribution, Reader, check_fragment_size
from ps_server.rules.decisions import FinishFragment
from tests.strategies import fast, manifests

Array = NDArray[Any]
Arrays = Mapping[str, Array]

seeds = st.integers(0, 2**32 - 1)
ALL_DTYPES = Manifest(tuple(Variable(name, name, (37,)) for name in sorted(DTYPES)), 64)
# Rounding error of one operation, and the smallest number, in what is stored and in what is summed.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 5e-324, "float32": 1.5e-45, "float16": 6e-8, "bfloat16": 1e-40}


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


def everything(manifest: Manifest, buffer: Buffer) -> bytes:
    return b"".join(bytes(buffer.fragment(index)) for index in range(manifest.fragment_count))


def commit(center: Center) -> None:
    center.commit(center.room(0.0), lambda: None)


def read(center: Center) -> Arrays:
    flat = bytearray(everything(center.manifest, center.current))
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
            nonfinite += center.finish([FinishFragment(index, total_weight, untouched)]).total()
    return nonfinite


def whole_round(center: Center, *pushes: Pushed, seed: int = 0) -> int:
    chance = np.random.default_rng(seed)
    order = arrivals(len(pushes), center.manifest.fragment_count, chance)
    nonfinite = average(center, pushes, order, [bool(chance.integers(2)) for _ in pushes])
    commit(center)
    return nonfinite


# Values.


@fast
@given(
    manifests(min_elements=1),
    st.lists(st.sampled_from([1.0, 0.5, 3.0, 0.1, 1e-9, 7.25e4]), min_size=1, max_size=4),
    seeds,
)
def test_the_average_is_numpys_in_double_precision_up_to_rounding(
    manifest: Manifest, weights: list[float], seed: int
) -> None:
    chance = np.random.default_rng(seed)
    pushes = [Pushed(random_arrays(manifest, chance), weight) for weight in weights]
    center = center_of(manifest, random_arrays(manifest, chance))
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
@given(manifests(min_elements=1), st.tuples(st.sampled_from([1.0, 0.3]), st.sampled_from([1.0, 1e3])), seeds)
def test_the_average_of_two_is_bit_for_bit_the_same_in_any_order_of_arrival(
    manifest: Manifest, weights: tuple[float, float], seed: int
) -> None:
    chance = np.random.default_rng(seed)
    pushes = [Pushed(random_arrays(manifest, chance), weight) for weight in weights]
    results = set()
    for _ in range(3):
        center = Center(manifest)
        shared = [bool(chance.integers(2)) for _ in pushes]
        average(center, pushes, arrivals(2, manifest.fragment_count, chance), shared)
        commit(center)
        results.add(everything(manifest, center.current))
    assert len(results) == 1


@fast
@given(manifests(min_elements=1), st.sampled_from([1, 2, 4]), seeds)
def test_values_that_are_equal_on_one_two_or_four_workers_do_not_change_by_a_bit(
    manifest: Manifest, num_workers: int, seed: int
) -> None:
    values = random_arrays(manifest, np.random.default_rng(seed))
    center = center_of(manifest, values)
    before = everything(manifest, center.current)
    for _ in range(3):
        whole_round(center, *[Pushed(read(center))] * num_workers)
    assert everything(manifest, center.current) == before


@fast
@given(seeds)
def test_values_that_are_equal_on_three_workers_change_by_one_rounding_at_most_and_do_not_drift(seed: int) -> None:
    # (x + x + x) / 3 is the neighbour of x for a sixth of all x, and that one stays where it is.
    values = random_arrays(ALL_DTYPES, np.random.default_rng(seed))
    center = center_of(ALL_DTYPES, values)
    whole_round(center, *[Pushed(values)] * 3)
    once = everything(ALL_DTYPES, center.current)
    for name in ("float32", "float64"):
        assert np.all(np.abs(read(center)[name] - values[name]) <= np.spacing(np.abs(values[name])))
    for name in ("float16", "bfloat16"):
        assert read(center)[name].tobytes() == values[name].tobytes(), "a sum of these is exact"
    for _ in range(5):
        whole_round(center, *[Pushed(read(center))] * 3)
        assert everything(ALL_DTYPES, center.current) == once


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_of_16_bit_values_does_not_overflow(dtype: str) -> None:
    manifest = Manifest((Variable("v", dtype, (2,)),), 8)
    largest = np.array([65504.0, -65504.0]).astype(DTYPES[dtype])
    center = Center(manifest)
    assert whole_round(center, *[Pushed({"v": largest}, weight=1e6)] * 3) == 0
    assert read(center)["v"].tobytes() == largest.tobytes()


def test_the_sum_of_16_bit_values_is_rounded_once() -> None:
    # 1 + 2**-11 rounds to 1 in float16: summed there, both small ones would be lost.
    manifest = Manifest((Variable("v", "float16", ()),), 8)
    pushes = [Pushed({"v": np.array(value, np.float16)}) for value in (1.0, 2.0**-11, 2.0**-11, 0.0)]
    center = Center(manifest)
    whole_round(center, *pushes)
    assert read(center)["v"] == np.float16((1 + 2.0**-10) / 4)


@fast
@given(seeds)
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
@given(manifests(min_elements=1), seeds)
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


# Readers, restarts and memory.


@fast
@given(manifests(min_elements=1), st.integers(1, 6), seeds)
def test_no_reader_sees_a_center_that_changes(manifest: Manifest, rounds: int, seed: int) -> None:
    """Readers come and go at any time, also in the middle of a round; each sees the center it came for to the end."""
    chance = np.random.default_rng(seed)
    center = center_of(manifest, random_arrays(manifest, chance))
    expected = everything(manifest, center.current)
    readers: list[tuple[Any, Buffer, bytes]] = []
    for _ in range(rounds):
        pushes = [Pushed(random_arrays(manifest, chance)) for _ in range(2)]
        order = arrivals(2, manifest.fragment_count, chance)
        given = [0, 0]
        for worker in order:
            if chance.random() < 0.3:
                context = center.reading(center.current, Reader(0.0))
                context.__enter__()
                readers.append((context, center.current, expected))
            if readers and chance.random() < 0.3:
                readers.pop(int(chance.integers(len(readers))))[0].__exit__(None, None, None)
            index = given[worker]
            data = fragment(manifest, pushes[worker].values, index)
            center.accumulate(index, Contribution(str(worker), 1.0, data), given[1 - worker] <= index)
            given[worker] += 1
            if given[1 - worker] > index:
                center.finish([FinishFragment(index, 2.0, frozenset())])
            assert everything(manifest, center.current) == expected
            assert all(everything(manifest, buffer) == seen for _, buffer, seen in readers)
        commit(center)
        expected = everything(manifest, center.current)
        assert all(everything(manifest, buffer) == seen for _, buffer, seen in readers)
    for context, _, _ in readers:
        context.__exit__(None, None, None)


def test_a_reader_that_fails_does_not_hold_its_buffer_for_ever() -> None:
    center = Center(ALL_DTYPES)
    with contextlib.suppress(ZeroDivisionError), center.reading(center.current, Reader(0.0)):
        raise ZeroDivisionError
    assert not center.current.in_use


def test_a_buffer_is_in_use_until_its_last_reader_has_gone() -> None:
    center = Center(ALL_DTYPES)
    with center.reading(center.current, Reader(0.0)):
        with center.reading(center.current, Reader(0.0)):
            pass
        assert center.current.in_use
    assert not center.current.in_use


@fast
@given(manifests(min_elements=1), seeds)
def test_nothing_is_left_of_the_sums_of_a_round_that_started_over(manifest: Manifest, seed: int) -> None:
    chance = np.random.default_rng(seed)
    before = random_arrays(manifest, chance)
    center, other = center_of(manifest, before), center_of(manifest, before)
    broken = [Pushed(random_bits(manifest, chance), weight=3.0) for _ in range(2)]
    order = arrivals(2, manifest.fragment_count, chance)
    average(center, broken, order[: int(chance.integers(len(order) + 1))], [bool(chance.integers(2)) for _ in broken])
    center.restart()
    assert everything(manifest, center.current) == everything(manifest, other.current)
    pushes = [Pushed(random_arrays(manifest, chance), untouched=frozenset({0})) for _ in range(2)]
    for one in (center, other):
        whole_round(one, *pushes, seed=seed)
    assert everything(manifest, center.current) == everything(manifest, other.current)


def test_rounds_use_the_same_two_buffers_when_nobody_reads() -> None:
    center = Center(ALL_DTYPES)
    two = [center.current, center.next]
    for _ in range(3):
        whole_round(center, Pushed(read(center)))
        two.reverse()
        assert center.current is two[0]
        assert center.next is two[1]


def test_a_buffer_that_is_read_is_replaced_once_and_dropped_when_its_reader_has_gone() -> None:
    center = Center(ALL_DTYPES)
    held = center.current
    with center.reading(held, Reader(0.0)):
        for _ in range(3):
            whole_round(center, Pushed(read(center)))
            assert held is not center.current
            assert held is not center.next
        two = {id(center.current), id(center.next)}
    whole_round(center, Pushed(read(center)))
    assert {id(center.current), id(center.next)} == two


def readers_of(center: Center, ended: list[str], **paces: int) -> contextlib.ExitStack:
    """Readers of the present center; each has read the bytes given for it."""
    stack = contextlib.ExitStack()
    for name, read_bytes in paces.items():

        def end(error: ModelAverageError, name: str = name) -> None:
            assert error.reason is Reason.READER_TOO_SLOW
            ended.append(name)

        stack.enter_context(center.reading(center.current, Reader(0.0, end, read_bytes)))
    return stack


def test_of_three_old_centers_that_are_read_the_one_with_the_slowest_readers_is_given_up() -> None:
    center, ended = center_of(ALL_DTYPES, random_arrays(ALL_DTYPES, np.random.default_rng(0))), list[str]()
    seen = dict[str, tuple[Buffer, bytes]]()
    with contextlib.ExitStack() as stack:
        for name, pace in (("quick", 900), ("slow", 10), ("slower", 20)):
            stack.enter_context(readers_of(center, ended, **{name: pace, f"{name}-too": 0}))
            seen[name] = center.current, everything(ALL_DTYPES, center.current)
            whole_round(center, Pushed(random_arrays(ALL_DTYPES, np.random.default_rng(pace))))
        assert sorted(ended) == ["slow", "slow-too"]
        assert center.next is seen["slow"][0]
        for name in ("quick", "slower"):
            assert everything(ALL_DTYPES, seen[name][0]) == seen[name][1]


@fast
@given(st.lists(st.sampled_from(["read", "leave", "round", "fail", "no memory"]), max_size=60), seeds)
def test_no_more_than_two_old_centers_are_kept_and_none_of_them_changes(events: list[str], seed: int) -> None:
    manifest, chance = Manifest((Variable("w", "float32", (8,)),), 16), np.random.default_rng(seed)
    center = center_of(manifest, random_arrays(manifest, chance))
    reading = dict[int, tuple[contextlib.ExitStack, Buffer, bytes]]()
    ended = list[str]()
    for number, event in enumerate(events):
        if event == "read":
            stack = readers_of(center, ended, **{str(number): int(chance.integers(100))})
            reading[number] = stack, center.current, everything(manifest, center.current)
        elif event == "leave" and reading:
            reading.pop(list(reading)[int(chance.integers(len(reading)))])[0].close()
        elif event != "leave":
            push = Pushed(random_arrays(manifest, chance))
            before = center.current, everything(manifest, center.current)
            average(center, [push], arrivals(1, manifest.fragment_count, chance), [False])
            with pytest.MonkeyPatch.context() as patch:
                if event == "no memory":
                    patch.setattr(center, "_new_buffer", out_of_memory)
                room = center.room(1.0)
            if event == "fail":
                with contextlib.suppress(ZeroDivisionError):
                    center.commit(room, lambda: 1 // 0)
                center.restart()
                assert (center.current, everything(manifest, center.current)) == before
            else:
                center.commit(room, lambda: None)
                assert read(center)["w"].tobytes() == push.values["w"].tobytes()
        for name in ended:
            reading.pop(int(name))[0].close()
        ended.clear()
        assert len({id(buffer) for _, buffer, _ in reading.values()} - {id(center.current)}) <= MAX_OLD_BUFFERS
        assert all(everything(manifest, buffer) == seen for _, buffer, seen in reading.values())
    for stack, _, _ in reading.values():
        stack.close()


def out_of_memory() -> Buffer:
    raise MemoryError


def test_a_reader_that_cannot_be_ended_is_never_in_the_way() -> None:
    center = center_of(ALL_DTYPES, random_arrays(ALL_DTYPES, np.random.default_rng(0)))
    before, kept = everything(ALL_DTYPES, center.current), center.current
    with center.reading(kept, Reader(0.0)):
        for number in range(MAX_OLD_BUFFERS + 2):
            with readers_of(center, [], reader=number):
                whole_round(center, Pushed(random_arrays(ALL_DTYPES, np.random.default_rng(number))))
        assert everything(ALL_DTYPES, kept) == before


def test_a_round_that_starts_over_leaves_alone_what_is_on_its_way_to_the_disk() -> None:
    center = center_of(ALL_DTYPES, random_arrays(ALL_DTYPES, np.random.default_rng(0)))
    first, second = (Pushed(random_arrays(ALL_DTYPES, np.random.default_rng(seed))) for seed in (1, 2))
    average(center, [first], arrivals(1, ALL_DTYPES.fragment_count, np.random.default_rng(0)), [False])
    kept, before = center.next, everything(ALL_DTYPES, center.next)
    with center.reading(kept, Reader(0.0)):
        center.restart()
        whole_round(center, second)
        assert everything(ALL_DTYPES, kept) == before
    with center.reading(center.next, Reader(0.0, lambda _: None)):
        kept = center.next
        center.restart()
        assert center.next is kept, "its readers are told to push again"


def test_where_no_thread_can_be_started_fragments_are_averaged_without(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest((Variable("w", "float32", (64,)),), 16)
    values = {"w": np.arange(64, dtype=np.float32)}
    center = Center(manifest)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for index in range(manifest.fragment_count):
        center.accumulate(index, Contribution("a", 1.0, fragment(manifest, values, index)), first=True)
    center.finish([FinishFragment(index, 2.0, frozenset()) for index in range(manifest.fragment_count)])
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
            center.finish([FinishFragment(index, 5.0, frozenset())])
        commit(center)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < manifest.size_bytes / 10
    assert all(np.all(array == np.ones((), array.dtype)) for array in read(center).values())


@pytest.mark.parametrize("size_bytes", [0, 63, 65, 128])
def test_a_fragment_of_the_wrong_size_is_refused_and_changes_nothing(size_bytes: int) -> None:
    center = center_of(ALL_DTYPES, random_arrays(ALL_DTYPES, np.random.default_rng(0)))
    before = everything(ALL_DTYPES, center.current)
    for refuse in (partial(check_fragment_size, center.manifest), center.load):
        with pytest.raises(
            ProtocolError, match=f"fragment 0 has {size_bytes} bytes; the manifest gives it 64"
        ) as error:
            refuse(0, memoryview(bytes(size_bytes)))
        assert error.value.reason is Reason.FRAGMENT_SIZE_WRONG
    assert everything(ALL_DTYPES, center.current) == before


def test_what_was_loaded_is_what_is_read_and_padding_is_zero() -> None:
    manifest = Manifest((Variable("a", "float16", (3,)), Variable("b", "float32", ())), 8)
    center = Center(manifest)
    center.load(0, memoryview(b"abcdefXX"))
    center.load(1, memoryview(b"ghij"))
    assert everything(manifest, center.current) == b"abcdef\0\0ghij"
