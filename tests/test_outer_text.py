"""Outer optimizers as text: on the wire, in flags, in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.outer import AVERAGE, OUTER_OPTIMIZERS, OuterAdam, OuterOptimizer, OuterSGD, outer_optimizer, text_of
from modelaverage.outer.text import MAX_TEXT_BYTES
from tests.strategies import fast
from tests.toy_outer import ToyMomentum

fractions = st.floats(0, 1, exclude_max=True)
rates = st.floats(1e-300, 1e300)


@fast
@given(st.one_of(st.builds(OuterSGD, rates, fractions), st.builds(OuterAdam, rates, st.tuples(fractions, fractions))))
def test_the_text_of_an_outer_optimizer_makes_an_equal_one(outer: OuterOptimizer) -> None:
    try:
        text = text_of(outer)
    except ValueError as error:
        assert f"at most {MAX_TEXT_BYTES}" in str(error)  # noqa: PT017
        return
    assert outer_optimizer(text) == outer
    assert len(text) <= MAX_TEXT_BYTES


@pytest.mark.parametrize(
    ("text", "outer"),
    [
        ("average", AVERAGE),
        ("sgd", OuterSGD()),
        ("sgd:lr=0.7,momentum=0.9,nesterov", OuterSGD(0.7, 0.9, nesterov=True)),
        ("sgd:nesterov=false,lr=1", OuterSGD(1.0)),
        ("adam:lr=0.1,betas=0.5/0.75,eps=1e-2", OuterAdam(0.1, (0.5, 0.75), 0.01)),
    ],
)
def test_a_text_may_leave_out_what_has_a_default(text: str, outer: OuterOptimizer) -> None:
    assert outer_optimizer(text) == outer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "outer optimizer '' is not known here, only average, sgd, adam"),
        ("yogi:lr=1", "outer optimizer 'yogi:lr=1' is not known here, only average, sgd, adam"),
        ("average:lr=1", "outer optimizer average has no setting 'lr'; it has none"),
        ("sgd:rate=1", "outer optimizer sgd has no setting 'rate'; it has lr, momentum, nesterov"),
        ("sgd:lr=1,lr=1", "names lr twice"),
        ("sgd:lr", "sgd: lr is ''; it must be a number"),
        ("sgd:lr=0.7/0.9", "sgd: lr is '0.7/0.9'; it must be a number"),
        ("sgd:lr=a", "sgd: lr is 'a'; it must be a number"),
        ("sgd:lr=nan", "OuterSGD: lr is nan; it must be a number"),
        ("sgd:lr=inf", "OuterSGD: lr is inf; it must be a number"),
        ("sgd:lr=0", "OuterSGD: lr is 0.0; it must be a number above 0"),
        ("sgd:momentum=1", "OuterSGD: momentum is 1.0; it must be from 0 to less than 1"),
        ("sgd:momentum=-0.1", "OuterSGD: momentum is -0.1; it must be from 0 to less than 1"),
        ("sgd:nesterov", "OuterSGD: nesterov is True; it must be False without momentum"),
        ("sgd:nesterov=1,momentum=0.5", "sgd: nesterov is '1'; it must be true or false"),
        ("adam", "outer optimizer 'adam' needs lr, such as adam:lr=0.1"),
        ("adam:lr=1,betas=0.9", "adam: betas is '0.9'; it must be 2 numbers with slashes between them"),
        ("adam:lr=1,betas=0.9/1", r"OuterAdam: betas is \(0.9, 1.0\); it must be two numbers from 0 to less than 1"),
        ("adam:lr=1,eps=0", "OuterAdam: eps is 0.0; it must be a number above 0"),
        ("sgd:lr=" + "1" * 100, "is not known here"),
    ],
)
def test_a_text_that_names_no_outer_optimizer_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        outer_optimizer(text)


@pytest.mark.parametrize("value", ["0.5", None, True, math.nan, math.inf, [0.5], np.array(0.5)])
def test_a_setting_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"OuterSGD: lr is .*; it must be a number"):
        OuterSGD(lr=value)


def test_numbers_of_numpy_become_those_of_python() -> None:
    outer = OuterSGD(lr=np.float64(0.5), momentum=np.float32(0.25), nesterov=np.True_)  # type: ignore[arg-type]
    assert [type(value) for value in outer.settings.values()] == [float, float, bool]
    made, state = outer.update(np.zeros(3, np.float32), np.ones(3, np.float32), outer.init(np.zeros(3, np.float32)), 0)
    assert {made.dtype, state["momentum"].dtype} == {np.dtype(np.float32)}


def test_an_outer_optimizer_is_registered_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(made.name == name for name, made in OUTER_OPTIMIZERS.items())
    monkeypatch.setitem(OUTER_OPTIMIZERS, "toy", ToyMomentum)
    assert outer_optimizer("toy:momentum=0.25") == dataclasses.replace(ToyMomentum(), momentum=0.25)
