"""Names the workers that a round waits for. Pure; no rule depends on it."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from modelaverage.missing import LastSeen, Missing
from modelaverage.names import MAX_NAMES
from ps_server.seen.roster import Rank, Roster, WorkerRecord

__all__ = ["missing_of"]


def missing_of(
    named: Collection[str],
    unnamed: int,
    excluded: Collection[str],
    contributors: Collection[str],
    roster: Roster,
    now_s: float,
) -> Missing:
    """The workers that a round waits for.

    If the round needs more workers than it knows by name, likely candidates are named: contributors of the last round
    (after a restore, the server knows no others at first), then other workers that have pushed, then workers that have
    only pulled. Names are sorted; those that have only pulled come last.

    Args:
        named: workers whose pushes the round waits for in any case.
        unnamed: how many more workers it needs.
        excluded: workers whose pushes are whole, and workers that have finished.
        contributors: the workers in the last committed round.
        roster: the workers that the server has heard of.
        now_s: the time, on the roster's clock.
    """
    records, pushers = roster.records, set(named)
    if unnamed:
        pushers.update(name for name, record in records.items() if record.has_pushed)
        pushers.update(contributors)
        pushers.difference_update(excluded)
    lacking, others = len(named) + unnamed - len(pushers), set[str]()
    if lacking > 0:  # a worker may not have pushed yet; but an evaluator only pulls, too
        others.update(name for name, record in records.items() if record.may_push)
        others.difference_update(pushers, excluded)
    certain, known = frozenset(named), frozenset(contributors)

    def doubt(name: str) -> tuple[bool, int, str]:
        record = records.get(name)
        rank = Rank.COUNTED if name in known else Rank.READER if record is None else record.rank
        return name not in certain, -rank, name

    # Of too many candidates, the most certain are named.
    chosen = sorted(heapq.nsmallest(MAX_NAMES, pushers, key=doubt))
    chosen += sorted(heapq.nsmallest(MAX_NAMES - len(chosen), others, key=doubt))
    seen = tuple(_last_seen(records.get(name), now_s) for name in chosen)
    omitted = len(pushers) + len(others) - len(chosen)
    return Missing(tuple(chosen), omitted, max(0, lacking - len(others)), seen)


def _last_seen(record: WorkerRecord | None, now_s: float) -> LastSeen:
    return LastSeen() if record is None else LastSeen(record.has_left, now_s - record.last_seen_at_s)
