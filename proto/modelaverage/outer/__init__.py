"""Outer optimizers: what turns the center and the average of a round into the next center. Servers apply them; a chief
names one when it initializes.

To add one, write it in a file of its own (see `base.OuterOptimizer`) and add a line to `OUTER_OPTIMIZERS`.
"""

from __future__ import annotations

from modelaverage.outer import text
from modelaverage.outer.adam import OuterAdam
from modelaverage.outer.average import OuterAverage
from modelaverage.outer.base import OuterOptimizer
from modelaverage.outer.sgd import OuterSGD
from modelaverage.outer.text import text_of

__all__ = [
    "AVERAGE",
    "OUTER_OPTIMIZERS",
    "OuterAdam",
    "OuterAverage",
    "OuterOptimizer",
    "OuterSGD",
    "outer_optimizer",
    "text_of",
]

AVERAGE = OuterAverage()
"""The default."""

OUTER_OPTIMIZERS: dict[str, type[OuterOptimizer]] = {each.name: each for each in (OuterAverage, OuterSGD, OuterAdam)}
"""Every outer optimizer that this version knows."""


def outer_optimizer(named: str) -> OuterOptimizer:
    """The outer optimizer that a text names, such as ``sgd:lr=0.7,momentum=0.9,nesterov``. Raises ValueError."""
    return text.parse_outer(named, OUTER_OPTIMIZERS)
