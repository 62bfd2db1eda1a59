"""Measurements of rounds, for the status and the metrics. No rule depends on them.

Time is an argument, as in round.py. The seconds of a round, from its first push header to its commit, are split into
phases. It is *averaging* while the event loop adds or divides fragments; otherwise *receiving* while an open push owes
fragments; otherwise *waiting*. *Sending* follows: from the moment when the outcome may be sent to the end of the last
response. (Most of an average is sent earlier, while fragments are received.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelaverage.errors import Reason

__all__ = ["Histogram", "NO_TIMES", "Observations", "PHASES", "RoundTimes", "Sending"]

PHASES = ("waiting", "receiving", "averaging", "sending")
# Rounds take from a millisecond (a small model on one host) to many minutes (a large model and a missing worker).
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# The rate is measured over this many rounds.
_RECENT_ROUNDS = 20


@dataclass
class Histogram:
    """Counts durations by upper bounds, the last of which is infinite. All in seconds."""

    bounds_s: tuple[float, ...] = _BOUNDS_S
    sum_s: float = 0.0
    counts: list[int] = field(init=False)  # each bucket excludes the lower ones

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    def observe(self, duration_s: float) -> None:
        """Counts one."""
        self.counts[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)


@dataclass(eq=False)
class Sending:
    """The responses of one committed round that are being sent, by the number of their stream."""

    streams: set[int]
    since_s: float = 0.0


@dataclass(frozen=True)
class RoundTimes:
    """When a committed round began, on the server's clock, and its seconds by phase."""

    began_at_s: float = 0.0
    waiting_s: float = 0.0
    receiving_s: float = 0.0
    averaging_s: float = 0.0


NO_TIMES = RoundTimes()
"""Of a round whose beginning is unknown."""


class Observations:
    """Measurements of the round in progress and of earlier rounds.

    Attributes:
        phase_s: seconds of committed rounds, by phase.
        round_s: durations of committed rounds, from the first push header to the commit.
        checkpoint_s: durations of checkpoint writes, until the checkpoint outlives the process.
        rounds_committed: committed rounds since the server started; so are all counts below.
        rounds_restarted: rounds that were started over.
        rounds_without_all: rounds that committed without a worker that they had waited for.
        last_round_s: the duration of the last committed round.
        last_times: of the last committed round; None: there is none, or its beginning is unknown.
        pushes_retried: headers that repeat an earlier push.
        stale_pushes: pushes that were answered STALE.
        fragments_received: fragments added to an average.
        fragments_sent: fragments of averages, counted once for each worker.
        refused: refused calls, by reason.
    """

    def __init__(self) -> None:
        self.phase_s = {phase: Histogram() for phase in PHASES}
        self.round_s = Histogram()
        self.checkpoint_s = Histogram()
        self.checkpoint_failures = 0
        self.rounds_committed = self.rounds_restarted = self.rounds_without_all = 0
        self.pushes_retried = self.stale_pushes = 0
        self.last_round_s = 0.0
        self.last_times: RoundTimes | None = None
        self.fragments_received = self.fragments_sent = 0
        self.refused = {reason.name: 0 for reason in Reason}
        self._committed_at_s = deque[float](maxlen=_RECENT_ROUNDS)
        self._begin_round()

    def _begin_round(self) -> None:
        self._since_s: float | None = None  # time of the first header; None: no round is under way
        self._marked_s = 0.0  # time before this is in `_spent_s`
        self._spent_s = dict.fromkeys(PHASES, 0.0)
        self._incoming = set[int]()  # streams that owe fragments
        self._first_whole_at_s: float | None = None
        self._lateness_s: dict[str, float] = {}

    # The round in progress.

    def admitted(self, stream: int, owes_fragments: bool, now_s: float) -> None:
        """A push was admitted to the round."""
        if self._since_s is None:
            self._since_s = self._marked_s = now_s
        self._mark(now_s)
        if owes_fragments:
            self._incoming.add(stream)

    def whole(self, stream: int, worker_id: str, now_s: float) -> None:
        """The last fragment of a push has arrived."""
        self._mark(now_s)
        self._incoming.discard(stream)
        if self._first_whole_at_s is None:
            self._first_whole_at_s = now_s
        self._lateness_s.setdefault(worker_id, now_s - self._first_whole_at_s)

    def averaged(self, from_s: float, to_s: float) -> None:
        """Fragments were added or divided between these times."""
        if self._since_s is not None:
            self._mark(from_s)
            self._spent_s["averaging"] += to_s - from_s
            self._marked_s = to_s

    def ended(self, stream: int, under_way: bool, now_s: float) -> None:
        """A push's stream has ended. ``under_way``: whether the round in progress has any other push."""
        if self._since_s is not None:
            self._mark(now_s)
            self._incoming.discard(stream)
            if not under_way:
                self._begin_round()

    def started_over(self) -> None:
        """The round starts over: its pushes and its times are discarded."""
        self.rounds_restarted += 1
        self._begin_round()

    def committed(self, contributors: Iterable[str], now_s: float) -> dict[str, float]:
        """The round has committed. Returns how many seconds after the first whole push each contributor's became
        whole."""
        lateness_s = {worker_id: self._lateness_s.get(worker_id, 0.0) for worker_id in contributors}
        self.last_times = None
        if self._since_s is not None:
            self._mark(now_s)
            for phase in PHASES[:-1]:
                self.phase_s[phase].observe(self._spent_s[phase])
            self.round_s.observe(now_s - self._since_s)
            self.last_times = RoundTimes(self._since_s, *(self._spent_s[phase] for phase in PHASES[:-1]))
        self.rounds_committed += 1
        self._committed_at_s.append(now_s)
        self._begin_round()
        return lateness_s

    def _mark(self, now_s: float) -> None:
        self._spent_s["receiving" if self._incoming else "waiting"] += now_s - self._marked_s
        self._marked_s = now_s

    # After the commit.

    def answered(self, sending: Sending, stream: int, now_s: float) -> None:
        """The response on this stream has ended, successfully or not."""
        sending.streams.discard(stream)
        if not sending.streams:
            self.phase_s["sending"].observe(now_s - sending.since_s)

    def rounds_per_minute(self, now_s: float) -> float:
        """The rate over the last few rounds; an overdue round lowers it."""
        recent_s = list(self._committed_at_s)
        if len(recent_s) < 2:
            return 0.0
        mean_s = (recent_s[-1] - recent_s[0]) / (len(recent_s) - 1)
        return 60 / max(mean_s, now_s - recent_s[-1], 1e-9)
