"""A sequence of faults with their times, generated from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["SQUEEZES", "Fault", "Kind", "sequence"]

Kind = Literal["kill", "stop", "descriptors", "threads"]
SQUEEZES: tuple[Kind, ...] = ("descriptors", "threads")
"""What a process runs out of for a while."""

_SHORTEST_STOP_S = 0.5
_LONGEST_STOP_S = 3.0
_PART_OF_SQUEEZES = 0.25
_SHORTEST_SQUEEZE_S = 0.5
_LONGEST_SQUEEZE_S = 2.0
_MOST_SPARE = 3


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        at_s: seconds from the start of the run.
        process: the name of the process that it strikes.
        kind: kill is SIGKILL; stop is SIGSTOP, and SIGCONT later; descriptors and threads: it gets at most ``spare``
            more than it has.
        lasts_s: how long it lasts; 0 for a kill.
        spare: how many more descriptors or threads it may get.
        at_start: the fault strikes the next process, which is about to make most of its threads and connections.
    """

    at_s: float
    process: str
    kind: Kind
    lasts_s: float
    spare: int = 0
    at_start: bool = False


def sequence(seed: int, processes: Sequence[str], every_s: float, squeezed: str | None = None) -> Iterator[Fault]:
    """One fault every ``every_s`` seconds, without end; the same for the same arguments.

    Args:
        seed: another seed makes other faults.
        processes: the names of the processes that kills and stops strike.
        every_s: seconds.
        squeezed: the process that also runs out of descriptors and threads; None: no process.
    """
    chance = random.Random(seed)
    at_s = every_s
    while True:
        process = chance.choice(processes)
        stops, lasts_s = chance.random() < 0.5, round(chance.uniform(_SHORTEST_STOP_S, _LONGEST_STOP_S), 2)
        if squeezed is not None and chance.random() < _PART_OF_SQUEEZES:
            lasts_s = round(chance.uniform(_SHORTEST_SQUEEZE_S, _LONGEST_SQUEEZE_S), 2)
            kind, spare = chance.choice(SQUEEZES), chance.randint(0, _MOST_SPARE)
            yield Fault(at_s, squeezed, kind, lasts_s, spare, at_start=chance.random() < 0.5)
        else:
            yield Fault(at_s, process, "stop", lasts_s) if stops else Fault(at_s, process, "kill", 0.0)
        at_s += every_s
