"""The buffers of the center: readers, rounds that start over, commits that fail."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.errors import ModelAverageError, Reason
from modelaverage.manifest import Manifest, Variable
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import MAX_OLD_BUFFERS, Center, Finish
from ps_server.center.sums import Contribution
from tests.centers import (
    ALL_DTYPES,
    SEEDS,
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

# Readers, restarts and memory.


@fast
@given(manifests(min_elements=1), st.integers(1, 6), SEEDS)
def test_no_reader_sees_a_center_that_changes(manifest: Manifest, rounds: int, seed: int) -> None:
    """Readers come and go at any time, even in the middle of a round; each sees the center that it opened to the
    end."""
    chance = np.random.default_rng(seed)
    center = random_center(manifest, chance)
    expected = everything(center.current)
    readers: list[tuple[Any, Buffer, bytes]] = []
    for _ in range(rounds):
        pushes = [random_push(chance, manifest) for _ in range(2)]
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
                center.finish([Finish(index, 2.0, frozenset())])
            assert everything(center.current) == expected
            assert all(everything(buffer) == seen for _, buffer, seen in readers)
        commit(center)
        expected = everything(center.current)
        assert all(everything(buffer) == seen for _, buffer, seen in readers)
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
@given(manifests(min_elements=1), SEEDS)
def test_nothing_is_left_of_the_sums_of_a_round_that_started_over(manifest: Manifest, seed: int) -> None:
    chance = np.random.default_rng(seed)
    before = random_arrays(manifest, chance)
    center, other = center_of(manifest, before), center_of(manifest, before)
    broken = [Pushed(random_bits(manifest, chance), weight=3.0) for _ in range(2)]
    order = arrivals(2, manifest.fragment_count, chance)
    average(center, broken, order[: int(chance.integers(len(order) + 1))], [bool(chance.integers(2)) for _ in broken])
    center.restart()
    assert everything(center.current) == everything(other.current)
    pushes = [Pushed(random_arrays(manifest, chance), untouched=frozenset({0})) for _ in range(2)]
    for one in (center, other):
        whole_round(one, *pushes, seed=seed)
    assert everything(center.current) == everything(other.current)


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
    """Readers of the present center; each has read the number of bytes given for it."""
    stack = contextlib.ExitStack()
    for name, read_bytes in paces.items():

        def end(error: ModelAverageError, name: str = name) -> None:
            assert error.reason is Reason.READER_TOO_SLOW
            ended.append(name)

        stack.enter_context(center.reading(center.current, Reader(0.0, end, read_bytes)))
    return stack


def test_of_three_old_centers_that_are_read_the_one_with_the_slowest_readers_is_given_up() -> None:
    center, ended = random_center(), list[str]()
    seen = dict[str, tuple[Buffer, bytes]]()
    with contextlib.ExitStack() as stack:
        for name, pace in (("quick", 900), ("slow", 10), ("slower", 20)):
            stack.enter_context(readers_of(center, ended, **{name: pace, f"{name}-too": 0}))
            seen[name] = center.current, everything(center.current)
            whole_round(center, random_push(pace))
        assert sorted(ended) == ["slow", "slow-too"]
        assert center.next is seen["slow"][0]
        for name in ("quick", "slower"):
            assert everything(seen[name][0]) == seen[name][1]


@fast
@given(st.lists(st.sampled_from(["read", "leave", "round", "fail", "no memory"]), max_size=60), SEEDS)
def test_no_more_than_two_old_centers_are_kept_and_none_of_them_changes(events: list[str], seed: int) -> None:
    manifest, chance = Manifest((Variable("w", "float32", (8,)),), 16), np.random.default_rng(seed)
    center = random_center(manifest, chance)
    reading = dict[int, tuple[contextlib.ExitStack, Buffer, bytes]]()
    ended = list[str]()
    for number, event in enumerate(events):
        if event == "read":
            stack = readers_of(center, ended, **{str(number): int(chance.integers(100))})
            reading[number] = stack, center.current, everything(center.current)
        elif event == "leave" and reading:
            reading.pop(list(reading)[int(chance.integers(len(reading)))])[0].close()
        elif event != "leave":
            push = random_push(chance, manifest)
            before = center.current, everything(center.current)
            average(center, [push], arrivals(1, manifest.fragment_count, chance), [False])
            with pytest.MonkeyPatch.context() as patch:
                if event == "no memory":
                    patch.setattr(center, "_new_buffer", out_of_memory)
                room = center.room(1.0)
            if event == "fail":
                with contextlib.suppress(ZeroDivisionError):
                    center.commit(room, lambda: 1 // 0)
                center.restart()
                assert (center.current, everything(center.current)) == before
            else:
                center.commit(room, lambda: None)
                assert read(center)["w"].tobytes() == push.values["w"].tobytes()
        for name in ended:
            reading.pop(int(name))[0].close()
        ended.clear()
        assert len({id(buffer) for _, buffer, _ in reading.values()} - {id(center.current)}) <= MAX_OLD_BUFFERS
        assert all(everything(buffer) == seen for _, buffer, seen in reading.values())
    for stack, _, _ in reading.values():
        stack.close()


def out_of_memory() -> Buffer:
    raise MemoryError


def test_a_reader_that_cannot_be_ended_is_never_in_the_way() -> None:
    center = random_center()
    before, kept = everything(center.current), center.current
    with center.reading(kept, Reader(0.0)):
        for number in range(MAX_OLD_BUFFERS + 2):
            with readers_of(center, [], reader=number):
                whole_round(center, random_push(number))
        assert everything(kept) == before


def test_a_round_that_starts_over_leaves_alone_what_is_on_its_way_to_the_disk() -> None:
    center = random_center()
    first, second = (random_push(seed) for seed in (1, 2))
    average(center, [first], arrivals(1, ALL_DTYPES.fragment_count, np.random.default_rng(0)), [False])
    kept, before = center.next, everything(center.next)
    with center.reading(kept, Reader(0.0)):
        center.restart()
        whole_round(center, second)
        assert everything(kept) == before
    with center.reading(center.next, Reader(0.0, lambda _: None)):
        kept = center.next
        center.restart()
        assert center.next is kept, "its readers are told to push again"
