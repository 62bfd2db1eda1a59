"""What a case is, and the list of all cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelaverage.conformance.stage import Stage

__all__ = ["Case", "Play", "case", "registered", "slow_case"]

Play = Callable[[Stage], None]


@dataclass(frozen=True)
class Case:
    """One thing that a client must get right.

    Args:
        name: a rule.
        play: raises Miss if the client breaks it.
        slow: whether it mostly waits, for longer than all other cases take together.
    """

    name: str
    play: Play
    slow: bool


registered: list[Case] = []
"""In the order of the table."""


def case(play: Play) -> Play:
    """Adds a function to the list, under its name."""
    registered.append(Case(play.__name__.lstrip("_"), play, slow=False))
    return play


def slow_case(play: Play) -> Play:
    """Adds a function that mostly waits to the list."""
    registered.append(Case(play.__name__.lstrip("_"), play, slow=True))
    return play
