"""The arithmetic of outer optimizers: against torch.optim, the papers' own forms, and whatever cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from modelaverage.manifest import DTYPES, Manifest, Variable
from modelaverage.outer import AVERAGE, OUTER_OPTIMIZERS, OuterAdam, OuterOptimizer, OuterSGD
from ps_server.center.center import Center, Finish
from ps_server.center.sums import Contribution
from tests.centers import commit, fragment, read
from tests.outer_oracles import OUTERS, formula
from tests.strategies import fast

ROUNDS, COUNT = 50, 200
Array = NDArray[Any]
SGD = [
    OuterSGD(0.5),
    OuterSGD(1.0, 0.5),
    OuterSGD(0.7, 0.9),
    OuterSGD(0.7, 0.9, nesterov=True),
    OuterSGD(1.0, 0.6, nesterov=True),
]
ADAM = [OuterAdam(0.1), OuterAdam(0.01, (0.5, 0.75), 1e-2), OuterAdam(0.1, (0.0, 0.99))]
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}


def averages(dtype: str, seed: int = 0) -> tuple[Array, list[Array]]:
    """Where the center begins, and the average of each round: what the workers find drifts."""
    chance = np.random.default_rng(seed)
    start = chance.normal(size=COUNT)
    found = start + np.cumsum(chance.normal(0.0, 0.1, (ROUNDS, COUNT)), axis=0)
    return start.astype(dtype), [one.astype(dtype) for one in found]


def played(outer: OuterOptimizer, start: Array, found: list[Array]) -> list[Array]:
    """The center after every round."""
    center, state = start, outer.init(start)
    centers = list[Array]()
    for step, average in enumerate(found):
        center, state = outer.update(center, average, state, step)
        assert {center.dtype, *(array.dtype for array in state.values())} == {start.dtype}
        centers.append(center)
    return centers


def by_torch(outer: OuterOptimizer, start: Array, found: list[Array]) -> list[Array]:
    """The same, with the negated delta as the gradient of a parameter."""
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer: torch.optim.Optimizer
    if isinstance(outer, OuterSGD):
        optimizer = torch.optim.SGD([parameter], outer.lr, outer.momentum, nesterov=outer.nesterov)
    else:
        assert isinstance(outer, OuterAdam)
        optimizer = torch.optim.Adam([parameter], outer.lr, outer.betas, outer.eps)
    centers = list[Array]()
    for step, average in enumerate(found, 1):
        if isinstance(outer, OuterAdam):  # another lr and eps in every step undo torch's bias correction
            first, second = (1 - beta**step for beta in outer.betas)
            optimizer.param_groups[0].update(lr=outer.lr * first / second**0.5, eps=outer.eps / second**0.5)
        parameter.grad = parameter.detach() - torch.from_numpy(average)
        optimizer.step()
        centers.append(parameter.detach().numpy().copy())
    return centers


def assert_close(found: list[Array], expected: list[Array], tolerance: float) -> None:
    largest = max(np.abs(one).max() for one in expected)
    assert len(found) == len(expected) == ROUNDS
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= tolerance * largest


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outer", [*SGD, *ADAM])
def test_fifty_rounds_are_those_of_torch_on_the_negated_deltas(outer: OuterOptimizer, dtype: str) -> None:
    start, found = averages(dtype)
    assert_close(played(outer, start, found), by_torch(outer, start, found), TOLERANCE[dtype])


@pytest.mark.parametrize("outer", [*SGD, *ADAM])
def test_fifty_rounds_of_bfloat16_variables_are_those_of_torch_on_their_float32_master(outer: OuterOptimizer) -> None:
    start, pushed = averages("bfloat16")
    manifest = Manifest((Variable("v", "bfloat16", (COUNT,)),), 64)
    center = Center(manifest, outer=outer)
    for index in range(manifest.fragment_count):
        center.load(index, fragment(manifest, {"v": start}, index))
    # Of two workers; their average is in float32.
    other = [one[::-1].copy() for one in pushed]
    found = [(a.astype(np.float32) + b.astype(np.float32)) / 2 for a, b in zip(pushed, other, strict=True)]
    masters = list[Array]()
    for pair in zip(pushed, other, strict=True):
        for index in range(manifest.fragment_count):
            for worker, values in enumerate(pair):
                data = fragment(manifest, {"v": values}, index)
                center.accumulate(index, Contribution(str(worker), 1.0, data), first=worker == 0)
            center.finish([Finish(index, 2.0)])
        commit(center)
        masters.append(center.current.state.arrays["master"]["v"].copy())
        assert read(center)["v"].tobytes() == masters[-1].astype(DTYPES["bfloat16"]).tobytes()
    assert_close(masters, by_torch(outer, start.astype(np.float32), found), TOLERANCE["float32"])


# The same under other names.


def of_2017(outer: OuterSGD, start: Array, found: list[Array]) -> list[Array]:
    """What workers got from the first form of ModelAverageOptimizer: block_momentum_rate, block_learning_rate,
    use_nesterov."""
    bg, w, y = np.zeros_like(start), start.copy(), start.copy()
    sent = list[Array]()
    for average in found:
        bg = outer.momentum * bg + outer.lr * (y - average)
        w = w - bg
        y = w - outer.momentum * bg if outer.nesterov else w
        sent.append(y)
    return sent


def slow_momentum(outer: OuterSGD, start: Array, found: list[Array]) -> list[Array]:
    """SlowMo, equations 2 and 3; the workers' learning rate gamma is constant."""
    gamma, u, x = 0.05, np.zeros_like(start), start
    centers = list[Array]()
    for average in found:
        u = outer.momentum * u + (x - average) / gamma
        x = x - outer.lr * gamma * u
        centers.append(x)
    return centers


def block_momentum(outer: OuterSGD, start: Array, found: list[Array]) -> list[Array]:
    """BMUF, classical."""
    delta, w = np.zeros_like(start), start
    centers = list[Array]()
    for average in found:
        delta = outer.momentum * delta - outer.lr * (w - average)
        w = w + delta
        centers.append(w)
    return centers


def look_ahead(outer: OuterSGD, start: Array, found: list[Array]) -> list[Array]:
    """LookAhead: slow weights."""
    slow = start
    centers = list[Array]()
    for fast_weights in found:
        slow = slow + outer.lr * (fast_weights - slow)
        centers.append(slow)
    return centers


@pytest.mark.parametrize(
    ("method", "outer"),
    [
        (of_2017, OuterSGD(0.7, 0.9, nesterov=True)),
        (of_2017, OuterSGD(1.0, 0.75, nesterov=True)),
        (of_2017, OuterSGD(1.0, 0.75)),
        (slow_momentum, OuterSGD(1.0, 0.5)),
        (slow_momentum, OuterSGD(0.8, 0.7)),
        (block_momentum, OuterSGD(1.0, 0.75)),
        (block_momentum, OuterSGD(1.5, 0.5)),
        (look_ahead, OuterSGD(0.5)),
    ],
)
def test_sgd_is_what_was_published_under_other_names(
    method: Callable[[OuterSGD, Array, list[Array]], list[Array]], outer: OuterSGD
) -> None:
    start, found = averages("float64")
    assert_close(played(outer, start, found), method(outer, start, found), TOLERANCE["float64"])


def test_sgd_of_rate_1_without_momentum_is_the_plain_average() -> None:
    start, found = averages("float64")
    assert_close(played(OuterSGD(), start, found), played(AVERAGE, start, found), TOLERANCE["float64"])


# What every outer optimizer keeps to.


def test_the_rules_of_this_file_hold_for_every_registered_outer_optimizer() -> None:
    assert {type(outer) for outer in (AVERAGE, *OUTERS)} >= set(OUTER_OPTIMIZERS.values())


def values(dtype: type[np.floating[Any]]) -> st.SearchStrategy[tuple[Array, Array, Array, Array]]:
    elements = st_numpy.from_dtype(np.dtype(dtype), allow_nan=False)
    return st.integers(1, 40).flatmap(lambda n: st.tuples(*[st_numpy.arrays(dtype, n, elements=elements)] * 4))


def made(
    outer: OuterOptimizer, center: Array, average: Array, state: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    with np.errstate(all="ignore"):
        following, slots = outer.update(center, average, state, 7)
    return following, dict(slots)


@fast
@given(
    st.sampled_from((AVERAGE, *OUTERS)), st.one_of(values(np.float32), values(np.float64)), st.lists(st.integers(0, 40))
)
def test_any_cut_gives_the_same_bits_and_arguments_are_never_written_to(
    outer: OuterOptimizer, arrays: tuple[Array, ...], cuts: list[int]
) -> None:
    center, average, *slots = arrays
    state = {slot: np.abs(array) for slot, array in zip(outer.slots, slots, strict=False)}
    arguments = (center, average, *state.values())
    before = [array.tobytes() for array in arguments]
    for array in arguments:
        array.flags.writeable = False
    whole, whole_state = made(outer, center, average, state)
    assert [array.tobytes() for array in arguments] == before
    assert whole_state.keys() == set(outer.slots)
    assert {(array.shape, array.dtype) for array in (whole, *whole_state.values())} == {(center.shape, center.dtype)}
    bounds = [0, *sorted(min(cut, len(center)) for cut in cuts), len(center)]
    pieces = [
        made(outer, center[a:b], average[a:b], {slot: array[a:b] for slot, array in state.items()})
        for a, b in itertools.pairwise(bounds)
    ]
    assert np.concatenate([piece for piece, _ in pieces]).tobytes() == whole.tobytes()
    for slot, array in whole_state.items():
        assert np.concatenate([kept[slot] for _, kept in pieces]).tobytes() == array.tobytes()


@fast
@given(st.sampled_from(OUTERS), st.one_of(values(np.float32), values(np.float64)))
def test_a_step_is_the_formula_bit_for_bit(outer: OuterOptimizer, arrays: tuple[Array, ...]) -> None:
    center, average, *slots = arrays
    state = {slot: np.abs(array) for slot, array in zip(outer.slots, slots, strict=False)}
    with np.errstate(all="ignore"):
        expected, expected_state = formula(outer, center, average, state)
    found, found_state = made(outer, center, average, state)
    for one, other in ((found, expected), *((found_state[slot], expected_state[slot]) for slot in outer.slots)):
        assert np.isnan(one).tobytes() == np.isnan(other).tobytes()
        assert np.nan_to_num(one).tobytes() == np.nan_to_num(other).tobytes()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outer", [AVERAGE, *OUTERS])
def test_a_state_begins_with_zeros_of_the_pieces_shape_and_dtype(outer: OuterOptimizer, dtype: str) -> None:
    state = outer.init(np.ones(5, dtype))
    assert list(state) == list(outer.slots)
    assert all(array.dtype == dtype and array.shape == (5,) and not array.any() for array in state.values())
