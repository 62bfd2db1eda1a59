"""Whom a round waits for, by name, as far as anybody knows names. Pure: nothing here decides what the round does."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES
from ps_server.roster import Rank, Roster

__all__ = ["missing_of"]


def missing_of(
    named: Collection[str],
    unnamed: int,
    complete: Collection[str],
    contributors: Collection[str],
    roster: Roster,
) -> Missing:
    """Whom a round waits for.

    If it needs more workers than it knows by name, these may be those of the last round (a server that goes on from a
    checkpoint knows no others at first), others that have pushed, and, if these are too few, those that have only
    pulled. Names are sorted; those that have only pulled come last.

    Args:
        named: whose pushes it waits for in any case.
        unnamed: how many more it needs.
        complete: whose pushes are whole.
        contributors: of the last round that committed.
        roster: who was heard of.
    """
    records, pushers = roster.records, set(named)
    if unnamed:
        pushers.update(name for name, record in records.items() if record.has_pushed)
        pushers.update(contributors)
        pushers.difference_update(complete)
    lacking, others = len(named) + unnamed - len(pushers), set[str]()
    if lacking > 0:  # somebody may not have pushed yet; an evaluator only pulls, too
        others.update(name for name, record in records.items() if record.may_push)
        others.difference_update(pushers, complete)
    certain, known = frozenset(named), frozenset(contributors)

    def doubt(name: str) -> tuple[bool, int, str]:
        record = records.get(name)
        rank = Rank.COUNTED if name in known else Rank.READER if record is None else record.rank
        return name not in certain, -rank, name

    # Of very many, those are named of whom most is certain.
    chosen = sorted(heapq.nsmallest(MAX_NAMES, pushers, key=doubt))
    chosen += sorted(heapq.nsmallest(MAX_NAMES - len(chosen), others, key=doubt))
    return Missing(tuple(chosen), len(pushers) + len(others) - len(chosen), max(0, lacking - len(others)))
