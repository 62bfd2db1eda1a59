"""The barrier as a pure state machine: events in, decisions out. No I/O, no clock, no tensors.


A round is OPEN until its workers are settled, then CLOSED, and PREPARED when all pushes are whole. A prepared round is
committed or abandoned. Rules (docs/architecture.md has the picture):

- Fragments of a push arrive in order. One number therefore says how much of a push has arrived, and a broken push lacks
  every fragment from that number on.
- A round closes once every worker that it waits for (quorum.py) takes part. From then on a fragment is finished when
  all workers have delivered it, so finished fragments are a prefix, too.
- A worker that arrives at a closed round, or that the round has barred, is held until the commit. If workers of the
  round have been gone for the grace period, the round starts over and admits the held workers.
- Values added to a sum cannot be removed. When a partly added push can never be completed, because its process is gone
  or the grace period is over, the round starts over and every worker in it pushes again.
- A push that abstains counts at the barrier and sends no values. A push that restores carries the next center: its
  fragments replace the fragments of all other pushes.
- A prepared round may have to wait for its checkpoint (keeping.py). Then the caller allocates what the commit needs and
  calls `commit`, or `abandon` if that fails. Meanwhile no worker leaves or joins the round.
- Rounds do not wait for a worker that has finished its training; in strict mode, too, a round then needs one worker
  less. A finished worker that pushes again counts again. When all have finished, the job is over and a new run may
  begin.
- After the server was restored from an old checkpoint, workers may push from a later base step. If all workers that the
  round waits for push from the same one, the round uses it. If one pushes from an earlier step, those ahead are
  refused.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.names import listed
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Admit,
    CenterFollows,
    Commit,
    Decision,
    Dismiss,
    Hold,
    Push,
    Restart,
    TimeOut,
    Verdict,
)
from ps_server.rules.entry import Entry, EntryState
from ps_server.rules.fragments import Fragments, check_fragment_order
from ps_server.rules.keeping import Keeping
from ps_server.rules.policy import KeepingPolicy, RoundPolicy
from ps_server.rules.quorum import MAX_NAMES, Quorum

__all__ = ["Round", "RoundState"]


class RoundState(enum.Enum):
    """The state of a round."""

    OPEN = enum.auto()
    """The set of workers is not settled."""
    CLOSED = enum.auto()
    """No further worker is admitted. Each fragment is finished when all workers have delivered it."""
    PREPARED = enum.auto()
    """All pushes are whole and all fragments finished; `Round.commit` or `Round.abandon` comes next."""


class Round:
    """The ledger of the round in progress.

    The caller names each stream by a number that it never reuses. It must close every stream that `open` admitted or
    held, however the stream ends. It must call `expire` at `due_at_s`, and `commit` or `abandon` after a `Prepare`. It
    must carry out decisions in order, and call `abandon` if that fails.

    Args:
        policy: which workers a round waits for, and how long.
        fragment_count: how many fragments a whole push has; may be 0.
        global_step: the number of completed rounds.
        contributors: the workers in the last committed round.
        counted: by worker, the key of its last counted push.
        finished: finished workers; no round waits for them until they come back.
        keeping: which rounds are written to the disk before they are committed; None: none.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        fragment_count: int,
        global_step: int = 0,
        contributors: tuple[str, ...] = (),
        counted: Mapping[str, tuple[bytes, int]] | None = None,
        finished: frozenset[str] = frozenset(),
        keeping: KeepingPolicy | None = None,
    ) -> None:
        self.policy = policy
        self.fragment_count = fragment_count
        self.global_step = global_step
        self.contributors = contributors
        self.counted = dict(counted or {})
        self._quorum = Quorum(policy, finished)
        self._keeping = Keeping(keeping)
        self._base_step = global_step
        self._entries: dict[str, Entry] = {}
        self._streams: dict[int, str] = {}  # by attached stream, its worker
        self._held: dict[int, tuple[Push, float]] = {}  # by held stream, its push and since when it is held
        self._begin(Fragments(fragment_count))

    def __repr__(self) -> str:
        return f"Round({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def _begin(self, fragments: Fragments) -> None:
        """Begins an empty round. The caller makes ``fragments``, because allocating it may fail."""
        self._state = RoundState.OPEN
        self._entries.clear()
        self._streams.clear()
        self._held.clear()
        self._fragments = fragments
        self._whole = self._abstaining = 0  # how many pushes are whole, and how many of them abstain
        self._started_at_s: float | None = None
        self._quorum.enough_at_s = None

    # A push.

    def open(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        """A push header has arrived. Exactly one of the decisions is `Admit`, `Hold` or `CenterFollows`.

        Raises:
            ConflictError: BASE_STEP_AHEAD, WORKER_ID_IN_USE, PUSH_SUPERSEDED or ROUND_FULL; nothing has changed.
        """
        if self.counted.get(push.worker_id) == push.key:
            self._show_up(push)
            return [CenterFollows(Outcome.ALREADY_COUNTED)]
        if push.base_step < self.global_step:
            self._show_up(push)
            return [CenterFollows(Outcome.STALE)]
        entry = self._entries.get(push.worker_id)
        if entry is not None:
            entry.check_rival(push)
        if self._state is RoundState.PREPARED:
            self._show_up(push)
            return self._hold(stream, push, now_s) if entry is None else self._attach(entry, stream, push, now_s)
        decisions = self._agree_on_base_step(push)
        entry = self._entries.get(push.worker_id)
        if entry is None:
            return decisions + self._open_first(stream, push, now_s)
        return decisions + self._open_again(entry, stream, push, now_s)

    def take_fragments(self, stream: int, first: int, end: int, now_s: float) -> list[Decision]:
        """The fragments from ``first`` to ``end`` - 1 of this stream have arrived and passed all other checks.

        Returns an `Accumulate` for each, followed by the decisions that result. The ledger then counts all of them.

        Raises:
            ProtocolError: FRAGMENT_EXTRA, FRAGMENT_REPEATED or FRAGMENT_MISPLACED; nothing has changed.
        """
        entry = self._entry_of(stream)
        check_fragment_order(first, self.fragment_count if entry is None else entry.wanted, self.fragment_count)
        check_fragment_order(end - 1, min(end, self.fragment_count) - 1, self.fragment_count)
        assert entry is not None  # for a stream that owes nothing, every index is EXTRA or REPEATED
        decisions: list[Decision] = []
        for _ in range(first, end):
            decisions.append(self._fragments.take(entry))
            whole = entry.wanted == self.fragment_count
            decisions += self._advance(entry, now_s) if whole else self._finish_fragments()
        return decisions

    def check_complete(self, stream: int) -> None:
        """The stream was half-closed. Raises ProtocolError (FRAGMENT_MISSING) if fragments are missing."""
        entry = self._entry_of(stream)
        if entry is not None and entry.wanted < self.fragment_count:
            raise refusal(
                Reason.FRAGMENT_MISSING,
                f"the push ended after {entry.wanted} of {self.fragment_count} fragments; send the rest",
            )

    def close(self, stream: int, now_s: float) -> list[Decision]:
        """The stream has ended. Its fragments stay in the round; a worker that sent none leaves the round."""
        self._held.pop(stream, None)
        worker_id = self._streams.pop(stream, None)
        if worker_id is None:
            return []
        entry = self._entries[worker_id]
        entry.stream, entry.attached, entry.detached_at_s = None, None, now_s
        if entry.state is EntryState.EMPTY:
            return self._remove(worker_id, now_s)
        is_lost = entry.is_broken and self._quorum.is_lost(worker_id)
        return self._restart_without(worker_id) if is_lost else []

    # A worker.

    def leave(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decision]:
        """A worker's process says goodbye. A whole push stays; rounds with a quorum no longer wait for the worker."""
        self._quorum.leave(worker_id, incarnation)
        entry = self._entries.get(worker_id)
        if entry is None or not entry.is_broken:
            return self._advance(None, now_s)
        its_own = entry.push.incarnation == incarnation
        return self._restart_without(worker_id) if its_own or self._quorum.is_lost(worker_id) else []

    def finish(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decision]:
        """A worker has finished its training, and its process ends. A whole push stays. Ignored if another process of
        that name has a push open."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.attached is not None and entry.attached.incarnation != incarnation:
            return []
        self._quorum.finish(worker_id)
        is_broken = entry is not None and entry.is_broken
        return self._restart_without(worker_id) if is_broken else self._advance(None, now_s)

    def come_back(self, worker_id: str) -> None:
        """A worker is about to push: rounds wait for it, even if it had finished. If the job was over, this begins a
        new run, in which no worker has finished."""
        self._quorum.come_back(worker_id, self._entries.keys())
        if self._quorum.enough_at_s is not None and self._state is RoundState.OPEN and not self._has_enough:
            self._quorum.enough_at_s = None  # one more push is needed now

    # The end of a round.

    def begin_keeping(self) -> int:
        """The caller begins to write the current center, independently of a round. Returns a token for `kept`."""
        return self._keeping.begin()

    def kept(self, token: int, written: bool, now_s: float) -> list[Decision]:
        """The write that ``token`` names has ended; ``written``: whether its checkpoint outlives the server."""
        return [*self._keeping.kept(token, written, now_s)]

    def as_committed(self) -> tuple[int, tuple[str, ...], dict[str, tuple[bytes, int]]]:
        """The future `global_step`, `contributors` and `counted` of a prepared round, for its checkpoint."""
        counted = {worker_id: key for worker_id, key in self.counted.items() if worker_id not in self._entries}
        counted.update((worker_id, entry.push.key) for worker_id, entry in self._entries.items())
        for worker_id in list(counted)[: max(0, len(counted) - MAX_NAMES)]:  # ordered by time of counting
            del counted[worker_id]
        names = (worker_id for worker_id, entry in self._entries.items() if not entry.abstains)
        return self._base_step + 1, tuple(sorted(names)), counted

    def commit(self, now_s: float) -> Commit:
        """Commits a prepared round. If this raises, `global_step` is unchanged and the round must be abandoned."""
        assert self._state is RoundState.PREPARED
        assert not self._keeping.is_waiting
        _, untouched, _ = self._fragments.result(self._entries.values(), self._is_base)
        global_step, contributors, counted = self.as_committed()
        verdicts: dict[int, Verdict] = {}
        late_s: list[float] = []
        for entry in self._entries.values():
            assert entry.whole_at_s is not None
            assert self._quorum.enough_at_s is not None
            if entry.whole_at_s > self._quorum.enough_at_s:
                late_s.append(entry.whole_at_s - self._quorum.enough_at_s)
            if entry.stream is not None:
                outcome = Outcome.COMMITTED if entry.attached == entry.push else Outcome.ALREADY_COUNTED
                verdicts[entry.stream] = Verdict(outcome, now_s - entry.whole_at_s)
        present = frozenset(self._entries)
        commit = Commit(global_step, contributors, present, untouched, verdicts, tuple(self._held), self.age_s(now_s))
        fragments = Fragments(self.fragment_count)
        self._quorum.committed(late_s)
        self._begin(fragments)
        self._keeping.committed()
        # Last, because after a failure before this point the round can still be abandoned.
        self.global_step, self.contributors, self.counted = global_step, contributors, counted
        return commit

    def abandon(self, begun: int | None = None, under_way: Collection[int] = ()) -> None:
        """The caller failed at something: the round starts over, whatever state it is in, and forgets its streams.

        Args:
            begun: the token of the last write that has begun; None: every `KeepFirst` was carried out, and `kept` told.
            under_way: otherwise, the tokens of the writes that have begun and not ended.
        """
        self._keeping.start_over(begun, under_way)
        self._begin(Fragments(self.fragment_count))

    # Time.

    @property
    def due_at_s(self) -> float | None:
        """When `expire` must be called; None if only an event can change the round."""
        due_at_s = [at_s for at_s in (self._grace_over_at_s, self._keeping.due_at_s) if at_s is not None]
        if self.policy.round_timeout_s is not None:
            due_at_s += [since_s + self.policy.round_timeout_s for since_s in self._waiting_since_s().values()]
        return min(due_at_s, default=None)

    def expire(self, now_s: float) -> list[Decision]:
        """Time has passed."""
        decisions: list[Decision] = [*self._keeping.expire(now_s)]
        over_at_s = self._grace_over_at_s
        if over_at_s is not None and now_s >= over_at_s:
            is_enough = self._quorum.enough_at_s is not None
            decisions += self._go_on_without_the_late(now_s) if is_enough else self._let_in_the_held()
        if self._state is RoundState.PREPARED and decisions:
            return decisions  # all streams have stopped waiting
        timeout_s = self.policy.round_timeout_s
        if timeout_s is not None:
            waiting_since_s = self._waiting_since_s()
            late = tuple(stream for stream, since_s in waiting_since_s.items() if now_s >= since_s + timeout_s)
            for stream in late:
                self.close(stream, now_s)
            decisions += [TimeOut(late, timeout_s)] if late else []
        return decisions

    # For the status page.

    @property
    def state(self) -> RoundState:
        """The state of the round in progress."""
        return self._state

    @property
    def prepared(self) -> bool:
        """Whether all pushes are whole: the round waits for its checkpoint or for `commit`."""
        return self._state is RoundState.PREPARED

    @property
    def finished(self) -> frozenset[str]:
        """Workers that have finished; no round waits for them until they come back."""
        return self._quorum.finished

    @property
    def job_is_over(self) -> bool:
        """Whether all workers have finished."""
        return self._quorum.is_over(self._entries.keys())

    @property
    def training(self) -> int:
        """How many workers have not finished; at least 1 while any worker still trains."""
        return 0 if self.job_is_over else max(1, self.policy.num_workers - len(self.finished))

    def holds(self, stream: int) -> bool:
        """Whether a stream belongs to the round in progress, or is held until its end."""
        return stream in self._streams or stream in self._held

    @property
    def under_way(self) -> bool:
        """Whether a push has arrived in the round in progress."""
        return self._started_at_s is not None

    def age_s(self, now_s: float) -> float:
        """Seconds since the first push of the round in progress; 0 if none has arrived."""
        return 0.0 if self._started_at_s is None else now_s - self._started_at_s

    def given(self, worker_id: str) -> int:
        """How many fragments of a worker's push the round no longer needs; all if the push abstains."""
        entry = self._entries.get(worker_id)
        return 0 if entry is None else entry.wanted

    def has(self, worker_id: str) -> bool:
        """Whether a push of the worker takes part in the round, perhaps one whose stream has ended."""
        return worker_id in self._entries

    @property
    def complete(self) -> frozenset[str]:
        """Workers whose push in the round in progress is whole."""
        return frozenset(worker_id for worker_id, entry in self._entries.items() if entry.whole_at_s is not None)

    @property
    def has_complete(self) -> bool:
        """Whether any push in the round in progress is whole."""
        return self._whole > 0

    @property
    def full(self) -> bool:
        """Whether every worker that the round waits for has a whole push or an attached stream."""
        return self._state is not RoundState.OPEN and all(
            entry.stream is not None or entry.state is EntryState.WHOLE for entry in self._entries.values()
        )

    @property
    def given_up(self) -> frozenset[str]:
        """The workers that the round in progress goes on without."""
        return self._quorum.barred - self._entries.keys()

    @property
    def waits_for(self) -> tuple[frozenset[str], int]:
        """Names of known workers whose pushes are not whole yet, and how many unknown workers the round needs."""
        present = self._entries.keys()
        names = present | (self._quorum.absent(present) if self._state is RoundState.OPEN else set())
        return frozenset(names - self.complete), max(0, self._quorum.needed(present) - len(names))

    # How a push is admitted.

    def _open_first(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        """The header of a worker that is not in the round."""
        barred = self._quorum.is_barred(push.worker_id)
        decisions = [] if barred else self._make_room(push.worker_id)
        self._show_up(push)
        self._base_step = push.base_step
        if barred or self._state is RoundState.CLOSED:
            return decisions + self._hold(stream, push, now_s)
        return decisions + self._admit(stream, push, now_s)

    def _open_again(self, entry: Entry, stream: int, push: Push, now_s: float) -> list[Decision]:
        """The header of a worker that is in the round: a retry, or a different push."""
        decisions = self._detach(entry)
        if entry.push != push and entry.state is EntryState.PARTIAL:
            cause = f"{push.worker_id!r} makes another push; its earlier one never came whole"
            decisions += self._restart(cause)
        self._show_up(push)
        return decisions + self._admit(stream, push, now_s)

    def _admit(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        entry = self._entries.setdefault(push.worker_id, Entry(push))
        if entry.state is EntryState.EMPTY:
            entry.push = push
            if entry.abstains:
                entry.wanted = self.fragment_count
        if self._started_at_s is None:
            self._started_at_s = now_s
        return self._attach(entry, stream, push, now_s) + self._advance(entry, now_s)

    def _attach(self, entry: Entry, stream: int, push: Push, now_s: float) -> list[Decision]:
        decisions = self._detach(entry)
        entry.stream, entry.attached, entry.attached_at_s = stream, push, now_s
        self._streams[stream] = push.worker_id
        return [*decisions, Admit(entry.wanted)]

    def _detach(self, entry: Entry) -> list[Decision]:
        """A newer stream replaces the attached one."""
        older = entry.stream
        if older is None:
            return []
        del self._streams[older]
        entry.stream = entry.attached = None
        error = refusal(Reason.PUSH_SUPERSEDED, f"a newer call of {entry.push.worker_id!r} took this one's place")
        return [Dismiss(older, error)]

    def _hold(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        self._held[stream] = push, now_s
        return [Hold()]

    def _show_up(self, push: Push) -> None:
        self.come_back(push.worker_id)
        self._quorum.show_up(push.worker_id, push.incarnation)

    def _agree_on_base_step(self, push: Push) -> list[Decision]:
        """Refuses workers that are ahead of others."""
        if not (self._entries or self._held) or push.base_step == self._base_step:
            return []
        if push.base_step > self._base_step:
            raise self._ahead(f"{push.worker_id!r} pushes from base step {push.base_step}")
        error = self._ahead(f"others push from base step {self._base_step}, {push.worker_id!r} from {push.base_step}")
        return self._start_over(f"{push.worker_id!r} pushes from an earlier base step than the others", error)

    def _ahead(self, what: str) -> ModelAverageError:
        return refusal(
            Reason.BASE_STEP_AHEAD,
            f"{what}, but the server is at global_step {self.global_step}, restored from an older checkpoint "
            "or initialized again; pull the center and go on from it",
        )

    def _make_room(self, newcomer: str) -> list[Decision]:
        """Decisions that make room for one more worker in a full round; raises ROUND_FULL if that is impossible."""
        held = {push.worker_id for push, _ in self._held.values() if not self._quorum.is_barred(push.worker_id)}
        if len(held | {*self._entries, newcomer}) <= self.policy.max_workers:
            return []
        for worker_id, entry in self._entries.items():
            if entry.is_broken:
                return self._restart(f"{newcomer!r} takes the place of {worker_id!r}, whose push broke off")
        raise refusal(
            Reason.ROUND_FULL,
            f"{newcomer!r} is one too many for round {self.global_step}, which has its {self.policy.max_workers} "
            f"workers ({listed(sorted(self._entries))}); start the server with a higher --num-workers "
            "or --max-workers",
        )

    # What happens after a fragment.

    def _entry_of(self, stream: int) -> Entry | None:
        """None for a stream that owes nothing: its round has committed, or it only receives the center."""
        worker_id = self._streams.get(stream)
        return None if worker_id is None else self._entries[worker_id]

    def _advance(self, entry: Entry | None, now_s: float) -> list[Decision]:
        """Advances the round after a change in its workers, or once ``entry`` may be whole."""
        if self._state is RoundState.PREPARED:
            return []
        if entry is not None and entry.wanted == self.fragment_count and entry.whole_at_s is None:
            entry.whole_at_s = now_s
            self._whole += 1
            self._abstaining += entry.abstains
        present = self._entries.keys()
        if self._state is RoundState.OPEN and self._quorum.is_complete(present):
            self._state = RoundState.CLOSED
        if self._quorum.enough_at_s is None and self._has_enough:
            self._quorum.enough_at_s = now_s
        decisions = self._finish_fragments()
        if self._state is RoundState.CLOSED and self._whole == len(present):
            self._state = RoundState.PREPARED
            decisions += self._keeping.prepare(self._base_step + 1, now_s)
        return decisions

    @property
    def _has_enough(self) -> bool:
        """Whether enough pushes are whole for the grace period to begin."""
        enough = self._quorum.enough(self._entries.keys())
        if self._state is RoundState.CLOSED:  # a finished worker may have returned too late for this round
            enough = min(enough, len(self._entries))
        return self._whole >= enough

    def _finish_fragments(self) -> list[Decision]:
        """Finishes the fragments that all workers have delivered, once the set of workers is settled."""
        if self._state is RoundState.OPEN:
            return []
        givers = len(self._entries) - self._abstaining
        return self._fragments.finish(self._entries.values(), givers, self._is_base)

    @property
    def _is_base(self) -> bool:
        """Whether the workers started from the center that the server has."""
        return self._base_step == self.global_step

    # How the round continues without a worker.

    @property
    def _grace_over_at_s(self) -> float | None:
        """When the grace period ends."""
        since_s = self._quorum.enough_at_s
        if since_s is None and self._held:
            broken_at_s = (entry.detached_at_s for entry in self._entries.values() if entry.is_broken)
            since_s = min(broken_at_s, default=None) if self._state is RoundState.CLOSED else self._quorum.barred_at_s
        if since_s is None or self._state is RoundState.PREPARED:
            return None
        return since_s + self._quorum.grace_s

    def _waiting_since_s(self) -> dict[int, float]:
        """By idle stream, since when it has waited."""
        waiting = {
            entry.stream: max(entry.attached_at_s, entry.whole_at_s)
            for entry in self._entries.values()
            if entry.stream is not None and entry.whole_at_s is not None
        }
        return waiting | {stream: since_s for stream, (_, since_s) in self._held.items()}

    def _go_on_without_the_late(self, now_s: float) -> list[Decision]:
        """The grace period is over: the round continues with the whole pushes only."""
        whole = self.complete
        missing = {worker_id: entry for worker_id, entry in self._entries.items() if worker_id not in whole}
        held = {push.worker_id for push, _ in self._held.values()}
        cause_s = self._quorum.grace_s
        late = self._quorum.bar_the_late(self._entries.keys(), whole, held, now_s)
        cause = f"it waited {cause_s:g} s for {listed(sorted(late))}"
        if any(entry.state is EntryState.PARTIAL for entry in missing.values()):
            return self._restart(cause)
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} goes on without you: {cause}; push again")
        decisions: list[Decision] = [Dismiss(e.stream, error) for e in missing.values() if e.stream is not None]
        for worker_id in missing:
            del self._entries[worker_id]
        return decisions + self._advance(None, now_s)  # prepared now: no push is missing

    def _let_in_the_held(self) -> list[Decision]:
        """The round admits the held workers: those that they waited for have been gone for the grace period."""
        broken = sorted(worker_id for worker_id, entry in self._entries.items() if entry.is_broken)
        self._quorum.bar_nobody()
        if self._state is RoundState.OPEN:
            return self._dismiss_held("others did not come back")
        self._quorum.give_up(broken)
        return self._restart(f"the push of {listed(broken)} broke off")

    def _dismiss_held(self, cause: str) -> list[Decision]:
        """Held workers that are not barred may push again; they will be admitted."""
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} has room: {cause}; push again")
        free = [stream for stream, (push, _) in self._held.items() if not self._quorum.is_barred(push.worker_id)]
        for stream in free:
            del self._held[stream]
        return [Dismiss(stream, error) for stream in free]

    def _remove(self, worker_id: str, now_s: float) -> list[Decision]:
        """Removes a worker that has delivered nothing; the round may then have room for others."""
        del self._entries[worker_id]
        self._state = RoundState.OPEN
        if not self._entries:
            self._started_at_s = None
        return self._advance(None, now_s) + self._dismiss_held(f"{worker_id!r} left")

    def _restart_without(self, worker_id: str) -> list[Decision]:
        return self._restart(f"{worker_id!r} left in the middle of its push")

    def _restart(self, cause: str) -> list[Decision]:
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} was started over: {cause}; push again")
        return self._start_over(cause, error)

    def _start_over(self, cause: str, error: ModelAverageError) -> list[Decision]:
        dismissed = [Dismiss(stream, error) for stream in (*self._streams, *self._held)]
        self._begin(Fragments(self.fragment_count))
        return [Restart(cause), *dismissed]
