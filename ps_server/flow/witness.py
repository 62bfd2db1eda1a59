"""What a job tells those who watch it: the measurements of rounds, and the history. No rule depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ps_server.flow.open_push import OpenPush
from ps_server.rules.decisions import Commit
from ps_server.rules.round import Round
from ps_server.seen.history import History
from ps_server.seen.marks import MarkKind
from ps_server.seen.observations import Observations
from ps_server.seen.roster import Roster

__all__ = ["Witness"]


class Witness:
    """Records events of one job.

    Args:
        round_: the job's ledger.
        roster: the workers.
        observations: measurements of rounds.
        history: past rounds.
        clock: seconds, monotonic.
    """

    def __init__(
        self, round_: Round, roster: Roster, observations: Observations, history: History, clock: Callable[[], float]
    ) -> None:
        self._round, self._roster, self._clock = round_, roster, clock
        self._observations, self._history = observations, history

    def mark(self, kind: MarkKind, worker_id: str | None = None) -> None:
        """Something has happened now, to a worker or to the whole round."""
        self._history.mark(kind, self._round.global_step, self._clock(), worker_id)

    def admitted(self, push: OpenPush, owes_fragments: bool) -> None:
        """A push was admitted to the round."""
        now_s = self._clock()
        self._observations.admitted(push.call.number, owes_fragments, now_s)
        record = self._roster.heard_push_of(push.worker_id, now_s)
        self._history.admitted(push.worker_id, push.incarnation, record.local_step, record.loss, now_s)
        if not owes_fragments:
            self.whole(push)

    def whole(self, push: OpenPush) -> None:
        """The last fragment of a push has arrived."""
        now_s = self._clock()
        self._observations.whole(push.call.number, push.worker_id, now_s)
        self._history.whole(push.worker_id, now_s)

    def averaged(self, from_s: float, nonfinite: Mapping[str, int]) -> None:
        """Fragments were added or divided from this time on; ``nonfinite``: by worker, values that are not finite."""
        self._roster.note_nonfinite(nonfinite)
        self._observations.averaged(from_s, self._clock())

    def ended(self, push: OpenPush) -> None:
        """The call of a push has ended."""
        number, now_s = push.call.number, self._clock()
        self._observations.ended(number, self._round.under_way, now_s)
        self.may_be_gone(push.worker_id)
        if push.sending is not None:
            self._observations.answered(push.sending, number, now_s)

    def may_be_gone(self, worker_id: str) -> None:
        """A worker may take part in the round no longer."""
        if not self._round.has(worker_id):
            self._history.withdrawn(worker_id)

    def was_stale(self, push: OpenPush) -> None:
        """A push was answered STALE."""
        self._observations.stale_pushes += 1
        self.mark(MarkKind.STALE, push.worker_id)

    def started_over(self) -> None:
        """The round starts over."""
        self._observations.started_over()
        self._history.discarded()
        self.mark(MarkKind.STARTED_OVER)

    def checkpointed(self, step: int | None) -> None:
        """The newest checkpoint is of this step; None: there is none."""
        if step is not None:
            self._history.checkpointed(step, self._clock())

    def committed(self, commit: Commit, given_up: frozenset[str], nonfinite: Mapping[str, int], now_s: float) -> None:
        """The round has committed, without the workers that it has given up."""
        seen = self._observations
        self._roster.count(seen.committed(commit.present, now_s))
        seen.last_round_s = commit.round_s
        others = len(self._round.finished - commit.present)
        seen.rounds_without_all += len(commit.present) + others < self._round.policy.num_workers
        self._history.committed(commit.global_step, commit.present, nonfinite, given_up, seen.last_times, now_s)
