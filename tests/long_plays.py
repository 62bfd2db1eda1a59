"""Which cases of a parametrized test run in `make test`, and which only in `make test-long`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["long_except"]


def long_except(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, for `pytest.mark.parametrize`, all but the quick ones marked `long`.

    Raises:
        ValueError: a quick case is not among the cases.
    """
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    if unknown:
        raise ValueError(f"quick cases that are no cases: {unknown}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.long)
        for case in cases
    ]
