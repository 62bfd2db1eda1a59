"""Outer optimizers by name: what turns the center and the average of a round into the next center.

To add one, write it in a file of its own (see `base.OuterOptimizer`) and add a line to `OUTER_OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ps_server.center.outer.average import AVERAGE, PlainAverage
from ps_server.center.outer.base import OuterOptimizer, Setting

__all__ = ["AVERAGE", "OUTER_OPTIMIZERS", "OuterOptimizer", "outer_optimizer"]

OUTER_OPTIMIZERS: dict[str, Callable[..., OuterOptimizer]] = {
    "average": PlainAverage,
}
"""Every outer optimizer that this version knows: what makes one from its settings, given by keyword."""


def outer_optimizer(name: str, settings: Mapping[str, Setting]) -> OuterOptimizer:
    """The outer optimizer of this name with these settings. Raises ValueError, which names what is not known."""
    make: Callable[..., Any] | None = OUTER_OPTIMIZERS.get(name)
    if make is None:
        known = ", ".join(OUTER_OPTIMIZERS)
        raise ValueError(f"outer optimizer {name[:40]!a} is not known here, only {known}")
    try:
        made: OuterOptimizer = make(**settings)
    except TypeError:
        shown = ", ".join(f"{key[:40]}={value!r}" for key, value in list(settings.items())[:10])
        raise ValueError(f"outer optimizer {name} has no such settings: {shown!a}") from None
    return made
