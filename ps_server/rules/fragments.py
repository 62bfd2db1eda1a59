"""The fragments of the round in progress: how each is added to its sum, and when and how it is finished."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from modelaverage.errors import Reason, refusal
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Accumulate, Addition, Decision, FinishFragment
from ps_server.rules.entry import Entry

__all__ = ["Fragments", "check_fragment_order"]


def check_fragment_order(index: int, expected: int, fragment_count: int) -> None:
    """Raises ProtocolError (FRAGMENT_EXTRA, FRAGMENT_REPEATED or FRAGMENT_MISPLACED) unless ``index`` is the next
    fragment."""
    if index >= fragment_count:
        raise refusal(
            Reason.FRAGMENT_EXTRA, f"fragment {index} does not exist; the model has {fragment_count} fragments"
        )
    if index < expected:
        raise refusal(Reason.FRAGMENT_REPEATED, f"fragment {index} came before; the first wanted is {expected}")
    if index > expected:
        raise refusal(Reason.FRAGMENT_MISPLACED, f"fragment {index} came where {expected} belongs")


@dataclass
class Fragments:
    """What the pushes of one round have delivered, fragment by fragment.

    Args:
        count: how many fragments the model has.

    Attributes:
        finished: how many fragments are finished; fragments finish in order.
    """

    count: int
    finished: int = field(default=0, init=False)
    _gifts: list[int] = field(init=False)  # by fragment, how many pushes have delivered it
    _restoring: list[Entry] = field(default_factory=list, init=False)  # that have delivered one
    _result: tuple[float, frozenset[int], bool] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._gifts = [0] * self.count

    def take(self, entry: Entry) -> Accumulate:
        """Records the next fragment of a push, and returns how to add it."""
        index, weight = entry.wanted, entry.push.weight
        restored_by = [other.push.worker_id for other in self._restoring if other.wanted > index]
        if entry.restores:
            if index == 0:
                self._restoring.append(entry)
            weight = 1.0
            is_first = all(entry.push.worker_id < other for other in restored_by)
            how = Addition.START if is_first else Addition.IGNORE
        elif restored_by:
            how = Addition.IGNORE
        else:
            how = Addition.ADD if self._gifts[index] else Addition.START
        self._gifts[index] += 1
        entry.wanted += 1
        return Accumulate(index, weight, how)

    def finish(self, entries: Collection[Entry], givers: int, is_base: bool) -> list[Decision]:
        """A `FinishFragment` for each fragment that is now finished because all ``givers`` have delivered it.

        Args:
            entries: all entries of the round, which is closed to others.
            givers: how many of them send fragments.
            is_base: see `result`.
        """
        decisions: list[Decision] = []
        while self.finished < self.count and self._gifts[self.finished] == givers:
            decisions.append(FinishFragment(self.finished, *self.result(entries, is_base)))
            self.finished += 1
        return decisions

    def result(self, entries: Collection[Entry], is_base: bool) -> tuple[float, frozenset[int], bool]:
        """The divisor of all sums, the untouched variables, and whether the outer optimizer takes a step; see
        `FinishFragment`. Fixed once a fragment is finished.

        Args:
            entries: all entries of the round.
            is_base: whether the workers started from the center that the server has.
        """
        if self._result is None:  # computed once a round: there may be many fragments and variables
            pushes = [entry.push for entry in entries if entry.push.purpose is Purpose.CONTRIBUTE]
            if any(entry.restores for entry in entries):
                self._result = 1.0, frozenset(), False
            elif pushes and is_base:
                untouched = frozenset.intersection(*(push.untouched for push in pushes))
                self._result = math.fsum(push.weight for push in pushes), untouched, True
            else:
                self._result = math.fsum(push.weight for push in pushes), frozenset(), False
        return self._result
