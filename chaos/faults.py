"""What happens when: a seed makes a sequence of faults. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fault", "Kind", "sequence"]

Kind = Literal["kill", "stop"]

_SHORTEST_STOP_S = 0.5
_LONGEST_STOP_S = 3.0


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        at_s: seconds from the start of the run.
        process: the name of whom it strikes.
        kind: kill is SIGKILL; stop is SIGSTOP, and SIGCONT later.
        lasts_s: how long a stop lasts; 0 for a kill.
    """

    at_s: float
    process: str
    kind: Kind
    lasts_s: float


def sequence(seed: int, processes: Sequence[str], every_s: float) -> Iterator[Fault]:
    """One fault every ``every_s`` seconds, without end; the same for the same arguments."""
    chance = random.Random(seed)
    at_s = every_s
    while True:
        process = chance.choice(processes)
        stops, lasts_s = chance.random() < 0.5, round(chance.uniform(_SHORTEST_STOP_S, _LONGEST_STOP_S), 2)
        yield Fault(at_s, process, "stop", lasts_s) if stops else Fault(at_s, process, "kill", 0.0)
        at_s += every_s
