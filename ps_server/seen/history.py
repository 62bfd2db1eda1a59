"""The life of a run, round by round, in bounded memory. No rule depends on it.

Time is an argument, as in round.py: seconds on the server's monotonic clock. The newest rounds are kept each by itself,
with the pushes of their workers. Older rounds are joined in pairs, then in fours, and so on, like the archives of
RRDtool: the further back, the coarser.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ps_server.seen.marks import Mark, MarkKind, Marks
from ps_server.seen.observations import NO_TIMES, RoundTimes
from ps_server.seen.past_round import Losses, PastPush, PastRound
from ps_server.seen.traffic import NO_TRAFFIC, Moved, Traffic

__all__ = ["DETAILED_ROUNDS", "History", "HistorySeen", "MAX_ENTRIES", "MAX_PUSHES", "Thinned"]

DETAILED_ROUNDS = 200
"""The newest rounds, kept one by one."""
MAX_PUSHES = 64
"""The most workers of a round whose pushes are kept, the first by name; the others are counted."""
# Of 2, 4, 8, 16 and 32 rounds in an entry, this many entries: 160 x 62 = 9,920 rounds besides the newest 200.
_ENTRIES_A_LEVEL, _LEVELS = 160, 5
MAX_ENTRIES = DETAILED_ROUNDS + _LEVELS * (_ENTRIES_A_LEVEL + 1)
"""The most entries of the history: rounds, and groups of joined rounds."""


@dataclass
class _Arrival:
    """A worker's push in the round in progress."""

    incarnation: bytes
    pushed_at_s: float
    local_step: int
    loss: float | None
    whole_at_s: float | None = None


class Thinned:
    """Past rounds: the newest each by itself, older ones joined, the oldest forgotten."""

    def __init__(self) -> None:
        self._newest = deque[PastRound]()
        # Level k has entries of 2 ** (k + 1) rounds; `_waiting` has the entry that waits for its other half.
        self._levels = [deque[PastRound]() for _ in range(_LEVELS)]
        self._waiting: list[PastRound | None] = [None] * _LEVELS

    def add(self, one: PastRound) -> None:
        """Adds the round that follows all others. O(1), but for a few joins."""
        self._newest.append(one)
        if len(self._newest) <= DETAILED_ROUNDS:
            return
        leaving: PastRound | None = self._newest.popleft().without_detail()
        for level in range(_LEVELS):
            if leaving is None:
                return
            half = self._waiting[level]
            if half is None:
                self._waiting[level] = leaving
                return
            self._waiting[level] = None
            entries = self._levels[level]
            entries.append(half.joined(leaving))
            leaving = entries.popleft() if len(entries) > _ENTRIES_A_LEVEL else None

    def entries(self) -> tuple[PastRound, ...]:
        """All entries, ascending by step."""
        found = list[PastRound]()
        for entries, half in zip(reversed(self._levels), reversed(self._waiting), strict=True):
            found.extend(entries)
            if half is not None:
                found.append(half)
        return (*found, *self._newest)

    @property
    def detailed_from(self) -> int | None:
        """The step of the oldest round that is kept by itself; None: there is none."""
        return self._newest[0].step if self._newest else None


@dataclass(frozen=True)
class HistorySeen:
    """The history at one moment.

    Args:
        first_step: the `global_step` at which this process began; None: there is no center yet.
        is_restored: whether it began from a checkpoint.
        rounds: ascending by step.
        detailed_from: the step of the first round that is kept by itself; None: there is none.
        marks: in the order of events.
    """

    first_step: int | None = None
    is_restored: bool = False
    rounds: tuple[PastRound, ...] = ()
    detailed_from: int | None = None
    marks: tuple[Mark, ...] = ()


@dataclass
class History:
    """What happened since the server started.

    Args:
        traffic: the server's counters; a round's bytes are what was moved since the round before.
    """

    traffic: Traffic
    _past: Thinned = field(default_factory=Thinned, init=False)
    _marks: Marks = field(default_factory=Marks, init=False)
    _arrivals: dict[str, _Arrival] = field(default_factory=dict, init=False)
    _moved: Moved = field(default=NO_TRAFFIC, init=False)
    _first_step: int | None = field(default=None, init=False)
    _is_restored: bool = field(default=False, init=False)
    _checkpoint_step: int | None = field(default=None, init=False)

    def seen(self) -> HistorySeen:
        """The history as it is now. It shares the past rounds, which do not change."""
        past = self._past
        return HistorySeen(
            self._first_step, self._is_restored, past.entries(), past.detailed_from, self._marks.in_order()
        )

    def begun(self, global_step: int, is_restored: bool, now_s: float) -> None:
        """There is a center: the chief's, or a checkpoint's."""
        self._first_step, self._is_restored = global_step, is_restored
        if is_restored:
            self.mark(MarkKind.RESTORED, global_step, now_s)

    def mark(self, kind: MarkKind, global_step: int, now_s: float, worker_id: str | None = None) -> None:
        """Something happened in the round that starts from ``global_step``."""
        self._marks.add(kind, global_step, now_s, worker_id)

    def checkpointed(self, step: int, now_s: float) -> None:
        """The newest checkpoint is of ``step``."""
        if step != self._checkpoint_step:
            self._checkpoint_step = step
            self.mark(MarkKind.CHECKPOINT, step, now_s)

    # The round in progress.

    def admitted(self, worker_id: str, incarnation: bytes, local_step: int, loss: float | None, now_s: float) -> None:
        """A push was admitted to the round: a new one, or one whose stream had broken."""
        known = self._arrivals.get(worker_id)
        if known is None or known.incarnation != incarnation:
            self._arrivals[worker_id] = _Arrival(incarnation, now_s, local_step, loss)
        else:
            known.local_step, known.loss = local_step, loss

    def whole(self, worker_id: str, now_s: float) -> None:
        """The last fragment of a worker's push has arrived."""
        arrival = self._arrivals.get(worker_id)
        if arrival is not None and arrival.whole_at_s is None:
            arrival.whole_at_s = now_s

    def withdrawn(self, worker_id: str) -> None:
        """A worker takes part in the round no longer."""
        self._arrivals.pop(worker_id, None)

    def discarded(self) -> None:
        """The round starts over: all its pushes are void."""
        self._arrivals.clear()

    def committed(
        self,
        global_step: int,
        present: Iterable[str],
        nonfinite: Mapping[str, int],
        without: Collection[str],
        times: RoundTimes | None,
        now_s: float,
    ) -> None:
        """A round has committed.

        Args:
            global_step: the step that it has reached.
            present: the workers that took part.
            nonfinite: by worker, how many of the values that it pushed were not finite.
            without: the workers that it gave up.
            times: of the round; None: unknown.
            now_s: the time.
        """
        took = NO_TIMES if times is None else times
        began_at_s = now_s if times is None else times.began_at_s
        arrivals = {name: self._arrivals.get(name, _Arrival(b"", began_at_s, 0, None)) for name in present}
        losses = Losses.of(arrival.loss for arrival in arrivals.values() if arrival.loss is not None)
        pushes = tuple(
            PastPush(
                worker_id=name,
                pushed_s=arrival.pushed_at_s - began_at_s,
                whole_s=(now_s if arrival.whole_at_s is None else arrival.whole_at_s) - began_at_s,
                loss=arrival.loss,
                local_step=arrival.local_step,
                nonfinite_values=nonfinite.get(name, 0),
            )
            for name, arrival in _first(arrivals)
        )
        moved = self.traffic.moved()
        self._past.add(
            PastRound(
                step=global_step - 1,
                last_step=global_step - 1,
                rounds=1,
                began_at_s=began_at_s,
                committed_at_s=now_s,
                took_s=now_s - began_at_s,
                waiting_s=took.waiting_s,
                receiving_s=took.receiving_s,
                averaging_s=took.averaging_s,
                moved=moved.since(self._moved),
                losses=losses,
                nonfinite_values=sum(nonfinite.values()),
                has_detail=True,
                pushes=pushes,
                pushes_omitted=len(arrivals) - len(pushes),
                without=tuple(sorted(without, key=_by_name)[:MAX_PUSHES]),
                without_omitted=max(0, len(without) - MAX_PUSHES),
            )
        )
        self._moved = moved
        self._arrivals.clear()


def _first(arrivals: Mapping[str, _Arrival]) -> list[tuple[str, _Arrival]]:
    """The first by name."""
    items = arrivals.items()
    if len(items) > MAX_PUSHES:
        return heapq.nsmallest(MAX_PUSHES, items, key=lambda item: _by_name(item[0]))
    return sorted(items, key=lambda item: _by_name(item[0]))  # for few of them this is much faster


def _by_name(name: str) -> tuple[int, str]:
    """Puts worker-2 before worker-10."""
    return len(name), name
