"""What a case is, and the list that every case puts itself on."""

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
        slow: whether it mostly waits, for longer than all others together.
    """

    name: str
    play: Play
    slow: bool


registered: list[Case] = []
"""In the order of the table."""


def case(play: Play) -> Play:
    """Puts a function on the list, under its name."""
    registered.append(Case(play.__name__.lstrip("_"), play, slow=False))
    return play


def slow_case(play: Play) -> Play:
    """Puts a function on the list that waits for long."""
    registered.append(Case(play.__name__.lstrip("_"), play, slow=True))
    return play
