"""Outer optimizers through the center: each against its formula, whatever happens to its rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, Manifest, Variable
from modelaverage.outer import AVERAGE, OuterOptimizer
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import Center, Finish
from ps_server.center.state import OuterState
from ps_server.center.sums import Contribution
from tests.centers import ALL_DTYPES, SEEDS, Arrays, fragment, random_arrays, read
from tests.outer_oracles import OUTERS, formula
from tests.strategies import fast, manifests
from tests.toy_outer import ToyMomentum, ToyWithoutMaster

TOY = ToyMomentum()
WITH_STATE = [outer for outer in OUTERS if outer.slots]
ENDS = ("commit", "commit", "start over", "commit fails", "checkpoint")
KINDS = ("steps", "steps", "does not step", "all abstain")


@dataclass
class Oracle:
    """Whole variables, no buffers: what the center and its state have to be after every commit."""

    outer: OuterOptimizer
    center: dict[str, NDArray[Any]]  # exact
    state: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)  # by variable

    def __post_init__(self) -> None:
        self.center = {
            name: array.astype(np.float32 if array.dtype.itemsize == 2 else array.dtype)
            for name, array in self.center.items()
        }
        self.state = {
            name: {slot: np.zeros_like(array) for slot in self.outer.slots} for name, array in self.center.items()
        }

    def advance(self, pushes: list[Arrays], kind: str, untouched: frozenset[str]) -> None:
        for name, center in self.center.items():
            if kind == "all abstain" or name in untouched:
                continue
            dtype = center.dtype.type
            total = pushes[0][name].astype(dtype)
            for push in pushes[1:]:
                total = total + push[name].astype(dtype)
            average = total / dtype(len(pushes))
            if kind == "does not step":
                self.center[name] = average
                continue
            self.center[name], self.state[name] = formula(self.outer, center, average, self.state[name])


class Play:
    """A center beside the oracle."""

    def __init__(self, manifest: Manifest, seed: int, outer: OuterOptimizer) -> None:
        self.manifest, self.chance, self.outer = manifest, np.random.default_rng(seed), outer
        values = random_arrays(manifest, self.chance)
        self.center = Center(manifest, outer=outer)
        for index in range(manifest.fragment_count):
            self.center.load(index, fragment(manifest, values, index))
        self.oracle = Oracle(outer, dict(values))

    def round(self, kind: str, end: str) -> None:
        """One round, which ends in this way."""
        manifest, center = self.manifest, self.center
        pushes = [random_arrays(manifest, self.chance) for _ in range(int(self.chance.integers(1, 4)))]
        untouched = frozenset(n for n in range(len(manifest.variables)) if self.chance.random() < 0.2)
        count = manifest.fragment_count
        finishing = int(self.chance.integers(count + 1)) if end == "start over" else count
        finishes = list[Finish]()
        for index in range(finishing):
            if kind != "all abstain":
                give = center.defer if self.chance.random() < 0.3 else center.accumulate
                for worker, push in enumerate(pushes):
                    data = fragment(manifest, push, index)
                    give(index, Contribution(str(worker), 1.0, data), first=worker == 0)
            weight = 0.0 if kind == "all abstain" else float(len(pushes))
            finishes.append(Finish(index, weight, untouched, kind != "does not step"))
        at_once = max(1, int(self.chance.integers(count + 1)))
        for start in range(0, len(finishes), at_once):
            center.finish(finishes[start : start + at_once], 7)
        self.check()
        if end == "start over":
            center.restart()
        elif end == "commit fails":
            with pytest.raises(ZeroDivisionError):
                center.commit(center.room(0.0), lambda: 1 // 0)
            center.restart()
        else:
            center.commit(center.room(0.0), lambda: None)
            self.oracle.advance(pushes, kind, frozenset(manifest.variables[number].name for number in untouched))
        if end == "checkpoint":  # another server goes on from it
            restored = Center(manifest, outer=self.outer)
            restored.load_arrays(center.current.arrays, center.current.state.arrays)
            self.center = restored
        self.check()

    def check(self) -> None:
        current = self.center.current
        for variable in self.manifest.variables:
            name, exact = variable.name, self.oracle.center[variable.name]
            assert current.arrays[name].tobytes() == exact.astype(DTYPES[variable.dtype]).tobytes()
            for slot in self.outer.slots:
                assert current.state.arrays[slot][name].tobytes() == self.oracle.state[name][slot].tobytes()
            if DTYPES[variable.dtype].itemsize == 2:
                assert current.state.arrays["master"][name].tobytes() == exact.tobytes()


plays = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(ENDS)), min_size=1, max_size=8)


@fast
@given(st.sampled_from(OUTERS), manifests(min_elements=1), plays, SEEDS)
def test_center_and_state_advance_together_and_only_when_a_round_commits(
    outer: OuterOptimizer, manifest: Manifest, rounds: list[tuple[str, str]], seed: int
) -> None:
    play = Play(manifest, seed, outer)
    for kind, end in rounds:
        play.round(kind, end)


@pytest.mark.parametrize("end", ["start over", "commit fails"])
@pytest.mark.parametrize("outer", WITH_STATE)
def test_a_state_that_advances_when_a_fragment_is_finished_is_caught(
    outer: OuterOptimizer, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = dict[int, OuterState]()

    def of_both(self: Center) -> Buffer:
        buffer = Buffer(self.manifest, None, self.outer)
        buffer.state = states.setdefault(id(self), buffer.state)
        return buffer

    monkeypatch.setattr(Center, "_new_buffer", of_both)
    play = Play(ALL_DTYPES, 0, outer)
    with pytest.raises(AssertionError):
        play.round("steps", end)


@pytest.mark.parametrize("outer", WITH_STATE)
def test_a_state_that_is_being_written_down_stays_as_it_is(outer: OuterOptimizer) -> None:
    play = Play(ALL_DTYPES, 0, outer)
    play.round("steps", "commit")
    kept, before = play.center.current, bits_of(play.center.current.state)
    with play.center.reading(kept, Reader(0.0)):
        for _ in range(3):
            play.round("steps", "commit")
        assert bits_of(kept.state) == before


def bits_of(state: OuterState) -> dict[tuple[str, str], bytes]:
    return {(slot, name): array.tobytes() for slot, arrays in state.arrays.items() for name, array in arrays.items()}


@pytest.mark.parametrize("outer", OUTERS)
def test_where_a_fragment_is_given_back_it_becomes_the_center_bit_for_bit_and_nothing_is_added(
    outer: OuterOptimizer,
) -> None:
    chance = np.random.default_rng(0)
    before, other, back = (random_arrays(ALL_DTYPES, chance) for _ in range(3))
    for given_back_last in (False, True):
        for shared in (False, True):
            center = Center(ALL_DTYPES, outer=outer)
            give = center.defer if shared else center.accumulate
            for index in range(ALL_DTYPES.fragment_count):
                center.load(index, fragment(ALL_DTYPES, before, index))
                if given_back_last:  # whatever came before is void
                    give(index, Contribution("a", 3.0, fragment(ALL_DTYPES, other, index)), first=True)
                give(index, Contribution("b", 1.0, fragment(ALL_DTYPES, back, index)), first=True)
                center.finish([Finish(index, 1.0, steps=False)])
            center.commit(center.room(0.0), lambda: None)
            assert {name: array.tobytes() for name, array in read(center).items()} == {
                name: array.tobytes() for name, array in back.items()
            }
            state = center.current.state.arrays
            assert not any(array.any() for slot in outer.slots for array in state[slot].values())
            assert all((array == back[name]).all() for name, array in state["master"].items())


def test_a_16_bit_variable_gains_what_its_master_gathers_in_steps_too_small_for_it() -> None:
    manifest = Manifest((Variable("v", "bfloat16", (2,)),), 8)
    values = {"v": np.ones(2, DTYPES["bfloat16"])}
    ends = list[float]()
    for outer in (ToyMomentum(lr=0.01, momentum=0.0), ToyWithoutMaster(lr=0.01, momentum=0.0)):
        center = Center(manifest, outer=outer)
        center.load(0, fragment(manifest, values, 0))
        for _ in range(50):  # each moves it by a hundredth of the way to 1.0625; the next bfloat16 is 1.0078
            average = fragment(manifest, {"v": np.full(2, 1.0625, DTYPES["bfloat16"])}, 0)
            center.accumulate(0, Contribution("a", 1.0, average), first=True)
            center.finish([Finish(0, 1.0)])
            center.commit(center.room(0.0), lambda: None)
        ends.append(float(read(center)["v"][0]))
    assert ends == [1.0234375, 1.0]  # 1.0247, rounded


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("outer", OUTERS)
def test_an_outer_step_is_the_same_bits_however_the_model_is_cut(
    outer: OuterOptimizer, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = tuple(Variable(name, name, (300,)) for name in sorted(DTYPES))
    results = set()
    for size_bytes, block in ((8, 1 << 15), (64, 3), (1024, 1), (1024, 7), (1 << 20, 64), (1 << 20, 1 << 15)):
        monkeypatch.setattr("ps_server.center.center._BLOCK", block)
        manifest = Manifest(variables, size_bytes)
        chance = np.random.default_rng(1)
        center = Center(manifest, outer=outer)
        start, pushes = random_arrays(manifest, chance), [random_arrays(manifest, chance) for _ in range(3)]
        for index in range(manifest.fragment_count):
            center.load(index, fragment(manifest, start, index))
        for _ in range(2):
            for index in range(manifest.fragment_count):
                for worker, push in enumerate(pushes):
                    center.accumulate(
                        index, Contribution(str(worker), 1.0, fragment(manifest, push, index)), worker == 0
                    )
            finishes = [Finish(index, 3.0) for index in range(manifest.fragment_count)]
            for start_at in range(0, len(finishes), threads):
                center.finish(finishes[start_at : start_at + threads])
            center.commit(center.room(0.0), lambda: None)
        values = tuple(read(center)[name].tobytes() for name in sorted(DTYPES))
        results.add((values, tuple(bits_of(center.current.state).items())))
    assert len(results) == 1


# What it takes.


def test_the_account_of_memory_has_both_copies_of_the_state() -> None:
    sizes = {name: 37 * DTYPES[name].itemsize for name in DTYPES}
    buffers = 2 * ALL_DTYPES.buffer_size_bytes + 2 * 37 * 4  # and the sums of the two 16-bit variables
    assert Center.memory_bytes(ALL_DTYPES) == buffers
    velocities = sizes["float32"] + sizes["float64"] + 2 * 37 * 4
    assert Center.memory_bytes(ALL_DTYPES, TOY) == buffers + 2 * (velocities + 2 * 37 * 4)
    plain, toy = Center(ALL_DTYPES), Center(ALL_DTYPES, outer=TOY)
    assert (plain.current.state.arrays, plain.next.state.arrays) == ({}, {})
    allocated = sum(a.nbytes for b in (toy.current, toy.next) for v in b.state.arrays.values() for a in v.values())
    assert allocated == Center.memory_bytes(ALL_DTYPES, TOY) - Center.memory_bytes(ALL_DTYPES)


def test_the_plain_average_copies_nothing() -> None:
    center, values = np.zeros(3), np.ones(3)
    made, state = AVERAGE.update(center, values, {}, 0)
    assert made is values
    assert state == {}
