"""The center of a job with a codec: the next one is exactly what workers can decode from the current one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client import OuterAdam, OuterSGD
from modelaverage.codecs import CODECS, RAW, Codec
from modelaverage.manifest import DTYPES, Manifest, Variable
from modelaverage.outer import AVERAGE, OuterOptimizer
from modelaverage.outer.base import MASTER, summed_in
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import MAX_OLD_BUFFERS, Center, Finish
from ps_server.center.sums import Contribution
from tests.centers import (
    SEEDS,
    Array,
    Arrays,
    Pushed,
    arrivals,
    commit,
    everything,
    fragment,
    random_arrays,
    random_bits,
    read,
)
from tests.outer_oracles import formula
from tests.strategies import fast

LOSSY = [codec for codec in CODECS.values() if codec is not RAW]
OUTERS = [AVERAGE, OuterSGD(0.7), OuterSGD(0.7, 0.9, nesterov=True), OuterAdam(0.1)]
# Variables that are coded and raw, and begin and end within fragments.
MODEL = Manifest(
    (
        Variable("w", "float32", (1500,)),
        Variable("scale", "float64", ()),
        Variable("h", "float16", (1100,)),
        Variable("few", "float32", (37,)),
        Variable("b", "bfloat16", (1024,)),
    ),
    1024,
)
COUNT = MODEL.fragment_count
_codecs, _outers = st.sampled_from(LOSSY), st.sampled_from(OUTERS)


def center_with(values: Arrays, codec: Codec, outer: OuterOptimizer = AVERAGE, manifest: Manifest = MODEL) -> Center:
    center = Center(manifest, outer=outer, codec=codec)
    for index in range(manifest.fragment_count):
        center.load(index, fragment(manifest, values, index))
    return center


def flat_of(values: Arrays) -> Array:
    return np.frombuffer(b"".join(bytes(fragment(MODEL, values, index)) for index in range(COUNT)), np.uint8)


def any_bits(chance: np.random.Generator) -> Arrays:
    """Values of every kind. The NaNs of 16-bit variables are those that float32 is rounded to: others do not survive
    arithmetic in float32."""
    values = random_bits(MODEL, chance)
    with np.errstate(invalid="ignore"):
        return {n: a.astype(np.float32).astype(a.dtype) if a.dtype.itemsize == 2 else a for n, a in values.items()}


def coded(codec: Codec, values: Arrays, base: Buffer, index: int) -> memoryview:
    pieces = MODEL.piece_arrays(index, flat_of(values))
    return memoryview(b"".join(codec.encode(MODEL, index, pieces, base.parts[index])))


def finished(center: Center, pushes: Sequence[Pushed], seed: int = 0, step: int = 0) -> None:
    """A round without its commit: pushes coded, raw and in shared memory, in any order, finished one by one or
    together."""
    chance = np.random.default_rng(seed)
    kinds = [int(chance.integers(3)) for _ in pushes]
    together, given = bool(chance.integers(2)), [0] * len(pushes)
    total_weight = sum(push.weight for push in pushes)
    untouched = frozenset.intersection(*(push.untouched for push in pushes))
    done = list[Finish]()
    for worker in arrivals(len(pushes), COUNT, chance):
        index, push = given[worker], pushes[worker]
        is_first = all(count <= index for count in given)
        if kinds[worker] == 0:
            data, codec = coded(center.codec, push.values, center.current, index), center.codec
        else:
            data, codec = fragment(MODEL, push.values, index), RAW
        give = center.defer if kinds[worker] == 2 else center.accumulate
        give(index, Contribution(str(worker), push.weight, data, codec), is_first)
        given[worker] += 1
        if all(count > index for count in given):
            done.append(Finish(index, total_weight, untouched))
            if not together:
                center.finish([done.pop()], step)
    if done:
        center.finish(done, step)


def decoded(codec: Codec, base: bytes, changes: Sequence[memoryview]) -> bytes:
    """What a worker with this base makes of the changes."""
    flat = np.frombuffer(bytearray(base), np.uint8)
    for index, data in enumerate(changes):
        codec.decode_into(MODEL, flat, index, data, flat)
    return flat.tobytes()


def changes_of(buffer: Buffer, codec: Codec) -> list[memoryview]:
    return [b for index in range(COUNT) for b in buffer.encoded(codec, index, index + 1)]


@fast
@given(_codecs, _outers, SEEDS)
def test_what_a_worker_decodes_is_the_next_center_bit_for_bit(codec: Codec, outer: OuterOptimizer, seed: int) -> None:
    chance = np.random.default_rng(seed)
    center = center_with(random_arrays(MODEL, chance), codec, outer)
    held = everything(center.current)
    for step in range(3):
        pushes = [Pushed(random_arrays(MODEL, chance), float(chance.choice([1.0, 3.0, 0.1]))) for _ in range(2)]
        finished(center, pushes, seed + step, step)
        commit(center)
        held = decoded(codec, held, changes_of(center.current, codec))
        assert held == everything(center.current)
        assert held == b"".join(center.current.encoded(RAW, 0, COUNT))


@fast
@given(_codecs, _outers, SEEDS)
def test_the_next_center_is_decode_of_encode_of_the_exact_one_and_state_keeps_the_exact_values(
    codec: Codec, outer: OuterOptimizer, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    center = center_with(random_arrays(MODEL, chance, 3.0), codec, outer)
    exact = {name: array.astype(summed_in(array.dtype)) for name, array in read(center).items()}
    state = {name: {slot: np.zeros(array.shape, array.dtype) for slot in outer.slots} for name, array in exact.items()}
    for step in range(3):
        pushed, before = random_arrays(MODEL, chance, 3.0), center.current
        for index in range(COUNT):
            data = fragment(MODEL, pushed, index)
            center.accumulate(index, Contribution("a", 1.0, data), first=True)
        center.finish([Finish(index, 1.0) for index in range(COUNT)], step)
        for name, current in before.arrays.items():
            mean = pushed[name].astype(exact[name].dtype)
            # Only 16-bit variables have masters: the center of others is what was coded.
            start = exact[name] if MASTER in before.state.arrays and name in before.state.arrays[MASTER] else current
            if outer == AVERAGE:
                exact[name] = mean
            else:
                with np.errstate(all="ignore"):
                    exact[name], state[name] = formula(outer, start.astype(mean.dtype), mean, state[name])
        expected = np.zeros(MODEL.buffer_size_bytes, np.uint8)
        for index, pieces in enumerate(MODEL.pieces):
            names = [MODEL.variables[piece.variable].name for piece in pieces]
            values = [exact[n].reshape(-1)[p.start : p.start + p.count] for n, p in zip(names, pieces, strict=True)]
            data = memoryview(b"".join(codec.encode(MODEL, index, values, before.parts[index])))
            codec.decode_into(MODEL, expected, index, data, before.flat)
        commit(center)
        assert everything(center.current) == expected.tobytes()
        for slot, by_variable in center.current.state.arrays.items():
            for name, array in by_variable.items():
                assert array.tobytes() == (exact if slot == MASTER else {name: state[name][slot]})[name].tobytes()


@fast
@given(_codecs, _outers, SEEDS)
def test_untouched_variables_keep_all_their_bytes(codec: Codec, outer: OuterOptimizer, seed: int) -> None:
    chance = np.random.default_rng(seed)
    untouched = frozenset(number for number in range(len(MODEL.variables)) if chance.random() < 0.6)
    before = any_bits(chance)
    before["w"][:100] = -0.0
    center = center_with(before, codec, outer)
    base = everything(center.current)
    finished(center, [Pushed(random_arrays(MODEL, chance), untouched=untouched) for _ in range(2)], seed)
    commit(center)
    for number, (name, array) in enumerate(before.items()):
        if number in untouched:
            assert read(center)[name].tobytes() == array.tobytes(), name
    assert decoded(codec, base, changes_of(center.current, codec)) == everything(center.current)


@fast
@given(_codecs, SEEDS)
def test_a_push_that_changes_nothing_keeps_every_bit_also_of_nan_and_minus_zero(codec: Codec, seed: int) -> None:
    chance = np.random.default_rng(seed)
    values = any_bits(chance)
    for name in ("w", "h", "b"):
        array = values[name]
        array[:50], array[50:60], array[60:70] = -0.0, np.inf, np.nan
    center = center_with(values, codec)
    before = everything(center.current)
    for index in range(COUNT):
        data = coded(codec, values, center.current, index)
        center.accumulate(index, Contribution("a", 1.0, data, codec), first=True)
        center.finish([Finish(index, 1.0)])
    commit(center)
    assert everything(center.current) == before


@pytest.mark.parametrize("codec", LOSSY)
def test_values_that_are_not_finite_are_counted_in_coded_pushes(codec: Codec) -> None:
    values = random_arrays(MODEL, np.random.default_rng(0))
    center = center_with(values, codec)
    bad = {name: array.copy() for name, array in values.items()}
    bad["w"][[3, 700, 1400]], bad["h"][5], bad["few"][7] = [np.nan, np.inf, -np.inf], np.nan, np.inf
    found = 0
    for index in range(COUNT):
        data = coded(codec, bad, center.current, index)
        found += center.accumulate(index, Contribution("a", 1.0, data, codec), first=True).total()
        found += center.finish([Finish(index, 1.0)]).total()
    assert found == 5
    commit(center)
    for name in ("w", "h", "few"):
        np.testing.assert_array_equal(np.isfinite(read(center)[name]), np.isfinite(bad[name]))


# Rounds that are no steps.


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("total_weight", [0.0, 1.0])
def test_a_round_without_a_step_is_not_coded(codec: Codec, outer: OuterOptimizer, total_weight: float) -> None:
    """All abstain: the center keeps its bits. A center is restored: its bits become the center."""
    chance = np.random.default_rng(0)
    center = center_with(random_arrays(MODEL, chance), codec, outer)
    finished(center, [Pushed(random_arrays(MODEL, chance))])
    commit(center)
    restored, before = any_bits(chance), everything(center.current)
    for index in range(COUNT):
        center.accumulate(index, Contribution("a", 1.0, fragment(MODEL, restored, index)), first=True)
        center.finish([Finish(index, total_weight, steps=False)])
    assert center.next.changes == [None] * COUNT
    commit(center)
    assert everything(center.current) == (flat_of(restored).tobytes() if total_weight else before)
    finished(center, [Pushed(random_arrays(MODEL, chance))])  # the buffer with the changes of two rounds ago
    base = everything(center.current)
    commit(center)
    assert decoded(codec, base, changes_of(center.current, codec)) == everything(center.current)


# Ids.


def test_every_center_has_an_id_of_its_own_and_with_raw_none_has() -> None:
    values = random_arrays(MODEL, np.random.default_rng(0))
    center, ids = center_with(values, CODECS["int8"]), list[int]()
    for _ in range(4):
        ids.append(center.current.center_id)
        finished(center, [Pushed(read(center))])
        commit(center)
    assert len(set(ids)) == 4
    assert all(0 < each < 2**64 for each in ids)
    raw = center_with(values, RAW)
    finished(raw, [Pushed(values)])
    assert raw.next.center_id == 0
    assert raw.next.changes == []


def test_a_round_that_starts_over_makes_a_center_of_another_id() -> None:
    center = center_with(random_arrays(MODEL, np.random.default_rng(0)), CODECS["int4"])
    current = center.current.center_id
    finished(center, [Pushed(random_arrays(MODEL, np.random.default_rng(1)))])
    abandoned = center.next.center_id
    center.restart()
    finished(center, [Pushed(random_arrays(MODEL, np.random.default_rng(2)))])
    assert len({current, abandoned, center.next.center_id, 0}) == 4


def test_a_commit_that_fails_leaves_the_center_its_id_and_its_changes() -> None:
    codec = CODECS["int8"]
    center = center_with(random_arrays(MODEL, np.random.default_rng(0)), codec)
    base = everything(center.current)
    finished(center, [Pushed(random_arrays(MODEL, np.random.default_rng(1)))])
    commit(center)
    now = center.current.center_id, everything(center.current)
    finished(center, [Pushed(random_arrays(MODEL, np.random.default_rng(2)))])
    with pytest.raises(ZeroDivisionError):
        center.commit(center.room(0.0), lambda: 1 / 0)
    center.restart()
    assert (center.current.center_id, everything(center.current)) == now
    assert decoded(codec, base, changes_of(center.current, codec)) == now[1]
    finished(center, [Pushed(random_arrays(MODEL, np.random.default_rng(3)))])
    commit(center)
    assert decoded(codec, now[1], changes_of(center.current, codec)) == everything(center.current)
    assert center.current.center_id not in (0, now[0])


def test_a_loaded_center_keeps_its_id_and_without_one_gets_a_new_one() -> None:
    values = random_arrays(MODEL, np.random.default_rng(0))
    center = Center(MODEL, codec=CODECS["int8"])
    center.load_arrays(values, {}, 77)
    assert center.current.center_id == 77
    found = set[int]()
    for _ in range(3):
        center.load_arrays(values, {})
        found.add(center.current.center_id)
    assert len(found - {0, 77}) == 3


# Readers, threads and memory.


@fast
@given(_codecs, st.integers(1, 6), SEEDS)
def test_what_a_slow_reader_reads_coded_stays_while_rounds_go_on(codec: Codec, rounds: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    center = center_with(random_arrays(MODEL, chance), codec)
    readers = list[tuple[Any, Buffer, list[bytes], bytes]]()
    for number in range(rounds):
        finished(center, [Pushed(random_arrays(MODEL, chance)) for _ in range(2)], seed + number)
        commit(center)
        if chance.random() < 0.7 and len(readers) < MAX_OLD_BUFFERS:
            context = center.reading(center.current, Reader(0.0))
            context.__enter__()
            seen = [bytes(each) for each in changes_of(center.current, codec)]
            readers.append((context, center.current, seen, everything(center.current)))
        for _, buffer, seen, flat in readers:
            assert [bytes(each) for each in changes_of(buffer, codec)] == seen
            assert everything(buffer) == flat
        if readers and chance.random() < 0.3:
            readers.pop(int(chance.integers(len(readers))))[0].__exit__(None, None, None)
    for context, *_ in readers:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("codec", LOSSY)
def test_threads_finish_a_round_as_one_thread_does(codec: Codec, outer: OuterOptimizer) -> None:
    results = set[tuple[bytes, bytes]]()
    for together in (False, True):
        chance = np.random.default_rng(0)
        center = center_with(random_arrays(MODEL, chance), codec, outer)
        for step in range(3):
            pushed = random_arrays(MODEL, chance)
            for index in range(COUNT):
                data = coded(codec, pushed, center.current, index)
                center.accumulate(index, Contribution("a", 2.0, data, codec), first=True)
            finishes = [Finish(index, 2.0) for index in range(COUNT)]
            for some in [finishes] if together else [[each] for each in finishes]:
                center.finish(some, step)
            commit(center)
        results.add((everything(center.current), b"".join(changes_of(center.current, codec))))
    assert len(results) == 1


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("codec", LOSSY)
def test_memory_bytes_is_what_a_center_takes(codec: Codec, outer: OuterOptimizer) -> None:
    manifest = Manifest((Variable("w", "float32", (600_000,)), Variable("h", "float16", (300_000,))), 1 << 18)
    pushed = {v.name: np.ones(v.shape, DTYPES[v.dtype]) for v in manifest.variables}
    fragments = [fragment(manifest, pushed, index) for index in range(manifest.fragment_count)]
    tracemalloc.start()
    try:
        before_bytes = tracemalloc.get_traced_memory()[0]
        center = Center(manifest, outer=outer, codec=codec)
        for _ in range(3):
            for index, data in enumerate(fragments):
                center.accumulate(index, Contribution("a", 1.0, data), first=True)
                center.finish([Finish(index, 1.0)])
            commit(center)
        took_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    finally:
        tracemalloc.stop()
    assert took_bytes == pytest.approx(Center.memory_bytes(manifest, outer, codec), rel=0.02)
