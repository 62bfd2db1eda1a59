"""The barrier as a pure state machine: events in, decisions out. No I/O, no clock, no tensors.

Rules (docs/architecture.md has the picture):

- Fragments of a push come in order, so how much of a push has come is one number, and what a broken push still lacks
  is everything from there on.
- A round is closed once everybody is there whom it waits for, or nobody else may come. From then on a fragment is
  finished when all of them have given it, and the round commits when all fragments are. As every worker gives its
  fragments in order, finished fragments are a prefix, too.
- Strict (the default): it waits for `num_workers` distinct workers. With a quorum: for all who have shown up, with any
  push, and have not left or missed a round since; but once `min_workers` pushes are whole only for the time of grace.
- Whoever comes to a closed round, or after it was given up, is held until the commit; but once those for whose sake it
  is held have been gone for the time of grace, it is let in.
- What was added to an average cannot be taken out. When a push that is partly in can never be completed, because its
  process is gone or the time of grace is over, the round starts over and everyone in it pushes again.
- A round whose pushes are all whole is *prepared*: the shell gets what the commit needs (room for the next round, a
  checkpoint) and calls `commit`, or `abandon` if it cannot. Until then nobody leaves the round or gets in.
- A worker that has finished its training is waited for no longer: a round needs one worker less, in strict mode, too.
  It counts again once it comes back. When all have finished the job is over, and a new run may begin.
- After a server came back from an old checkpoint, workers may push from a later base step. If all that the round waits
  for agree on it, that is the round; if anybody pushes from an earlier one, those who are ahead are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.names import listed
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Admit,
    CenterFollows,
    Commit,
    Decision,
    Dismiss,
    FinishFragment,
    Hold,
    Prepare,
    Push,
    Restart,
    TimeOut,
    Verdict,
)
from ps_server.rules.policy import Lateness, RoundPolicy

__all__ = ["Round", "check_fragment_order"]

# So many workers are remembered: their last counted pushes, to tell a retry whose answer was lost from a stale push,
# and who showed up. Names come from outside: whoever makes up new ones must not fill the memory.
_MAX_NAMES = 10_000


@dataclass
class _Member:
    """A worker's line in the ledger of the round in progress."""

    push: Push
    given: int = 0  # fragments 0 .. given-1 are in the accumulators
    completed_at_s: float | None = None
    gone_at_s: float = 0.0  # when its last stream ended
    stream: int | None = None
    attached: Push | None = None  # what the attached stream came with: another push than the first, after a restart
    attached_at_s: float = 0.0


@dataclass
class Round:
    """The ledger of the round in progress.

    Streams are named by numbers that the caller never uses twice. Every stream that `open` admitted or held has to be
    closed, however it ends. `expire` has to be called when the time is `due_at_s`, and `commit` or `abandon` some time
    after a `Prepare`.

    Args:
        policy: for whom a round waits, and how long.
        fragment_count: how many fragments a whole push has; may be 0.
        global_step: rounds completed.
        contributors: of the last committed round.
        counted: by worker, the key of the last push that was counted.
        finished: workers that no round waits for until they come back.
    """

    policy: RoundPolicy
    fragment_count: int
    global_step: int = 0
    contributors: tuple[str, ...] = ()
    counted: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()
    _members: dict[str, _Member] = field(default_factory=dict, init=False)
    _streams: dict[int, str] = field(default_factory=dict, init=False)
    _held: dict[int, tuple[Push, float]] = field(default_factory=dict, init=False)  # by stream, since when
    _barred: set[str] = field(default_factory=set, init=False)  # for whom this round has waited long enough
    _barred_at_s: float = field(default=0.0, init=False)
    # For whom a round with a quorum waits: who showed up and has not missed a round since, with the process that did.
    _expected: dict[str, bytes] = field(default_factory=dict, init=False)
    _knows_workers: bool = field(default=False, init=False)  # whether a quorum is enough besides the expected
    _lateness: Lateness = field(default_factory=Lateness, init=False)
    _contributions: list[int] = field(default_factory=list, init=False)  # by fragment
    _finished: int = field(default=0, init=False)  # fragments 0 .. _finished-1 are
    _kept: frozenset[int] | None = field(default=None, init=False)  # untouched variables, once a fragment is finished
    _complete_count: int = field(default=0, init=False)
    _closed: bool = field(default=False, init=False)  # whether it is certain whose pushes are averaged
    _prepared: bool = field(default=False, init=False)  # whether only `commit` is missing
    _base_step: int = field(default=0, init=False)
    _started_at_s: float | None = field(default=None, init=False)
    _enough_at_s: float | None = field(default=None, init=False)  # when a quorum's pushes were whole

    def __post_init__(self) -> None:
        self._contributions = [0] * self.fragment_count
        self._base_step = self.global_step

    def open(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        """A push header came. Exactly one of the decisions is `Admit`, `Hold` or `CenterFollows`.

        Raises:
            ConflictError: BASE_STEP_AHEAD, WORKER_ID_IN_USE, PUSH_SUPERSEDED or ROUND_FULL; nothing has changed.
        """
        if self.counted.get(push.worker_id) == push.key:
            self._expect(push)
            return [CenterFollows(Outcome.ALREADY_COUNTED)]
        if push.base_step < self.global_step:
            self._expect(push)
            return [CenterFollows(Outcome.STALE)]
        member, decisions = self._members.get(push.worker_id), list[Decision]()
        if member is not None:
            self._check_rivals(member, push)
        if self._prepared:
            return self._open_prepared(stream, push, member, now_s)
        decisions += self._agree_on_base_step(push)
        member = self._members.get(push.worker_id)
        barred = push.worker_id in self._barred
        if member is None and not barred:
            decisions += self._make_room(push.worker_id)
        self._expect(push)
        self._base_step = push.base_step
        if member is None:
            if self._closed or barred:
                self._held[stream] = push, now_s
                return [*decisions, Hold()]
        else:
            decisions += self._detach_older(member)
            if member.push != push and self._in_half(member):
                decisions += self._restart(f"{push.worker_id!r} pushes anew; its earlier push never came whole")
        member = self._members.setdefault(push.worker_id, _Member(push))
        if not self._has_begun(member):
            member.push = push
        self._attach(member, stream, push, now_s)
        if self._started_at_s is None:
            self._started_at_s = now_s
        decisions.append(Admit(member.given))
        return decisions + self._settle(member, now_s)

    def _open_prepared(self, stream: int, push: Push, member: _Member | None, now_s: float) -> list[Decision]:
        """A push header came to a prepared round: its worker waits for the commit, whether it is counted or not."""
        self._expect(push)
        if member is None:
            self._held[stream] = push, now_s
            return [Hold()]
        decisions = self._detach_older(member)
        self._attach(member, stream, push, now_s)
        return [*decisions, Admit(member.given)]

    def _attach(self, member: _Member, stream: int, push: Push, now_s: float) -> None:
        member.stream, member.attached, member.attached_at_s = stream, push, now_s
        self._streams[stream] = push.worker_id

    def check_fragment(self, stream: int, index: int) -> tuple[float, bool]:
        """A fragment came: the weight to add it with, and whether it is the first contribution to that fragment.

        Changes nothing; call `record_fragment` once the values are in the accumulator.

        Raises:
            ProtocolError: FRAGMENT_EXTRA, FRAGMENT_REPEATED or FRAGMENT_MISPLACED.
        """
        member = self._member_of(stream)
        check_fragment_order(index, self.fragment_count if member is None else member.given, self.fragment_count)
        assert member is not None  # every index is EXTRA or REPEATED for a stream that has nothing to give
        return member.push.weight, self._contributions[index] == 0

    def record_fragment(self, stream: int, now_s: float) -> list[Decision]:
        """The next fragment of this stream is in the accumulator."""
        member = self._members[self._streams[stream]]
        self._contributions[member.given] += 1
        member.given += 1
        return self._finish() if member.given < self.fragment_count else self._settle(member, now_s)

    def check_complete(self, stream: int) -> None:
        """The stream was half-closed. Raises ProtocolError (FRAGMENT_MISSING) if fragments are missing."""
        member = self._member_of(stream)
        if member is not None and member.given < self.fragment_count:
            raise refusal(
                Reason.FRAGMENT_MISSING,
                f"the push ended after {member.given} of {self.fragment_count} fragments; send the rest",
            )

    def close(self, stream: int, now_s: float) -> list[Decision]:
        """The stream has ended, in whatever way. What it gave stays; a worker that gave nothing leaves the round."""
        self._held.pop(stream, None)
        worker_id = self._streams.pop(stream, None)
        if worker_id is None:
            return []
        member = self._members[worker_id]
        member.stream, member.attached, member.gone_at_s = None, None, now_s
        if not self._has_begun(member):
            return self._remove(worker_id, now_s)
        return self._restart_without(worker_id) if self._is_gone(member) and self._has_left(worker_id) else []

    def leave(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decision]:
        """A worker's process goes, and says so. A whole push stays; a round with a quorum waits for it no longer."""
        if self._expected.get(worker_id) == incarnation:
            del self._expected[worker_id]
        member = self._members.get(worker_id)
        if member is None or not self._is_gone(member):
            return self._settle(None, now_s)
        its_own = member.push.incarnation == incarnation
        return self._restart_without(worker_id) if its_own or self._has_left(worker_id) else []

    def finish(self, worker_id: str, incarnation: bytes, now_s: float) -> list[Decision]:
        """A worker has finished its training, and its process goes. A whole push stays. Nothing happens if another
        process of that name has a push open."""
        member = self._members.get(worker_id)
        if member is not None and member.attached is not None and member.attached.incarnation != incarnation:
            return []
        if len(self.finished) < _MAX_NAMES:
            self.finished |= {worker_id}
        self._expected.pop(worker_id, None)
        is_gone = member is not None and self._is_gone(member)
        return self._restart_without(worker_id) if is_gone else self._settle(None, now_s)

    def come_back(self, worker_id: str) -> None:
        """A worker is going to push: rounds wait for it, even if it had finished. The first that comes after the end of
        a job begins another one, in which nobody has finished."""
        self.finished = frozenset() if self.job_is_over else self.finished - {worker_id}
        if not self._closed and self._complete_count < self._possible(self.policy.min_workers):
            self._enough_at_s = None  # what was enough without it no longer is

    # A prepared round.

    @property
    def prepared(self) -> bool:
        """Whether the round waits for `commit`, and for nobody."""
        return self._prepared

    def as_committed(self) -> tuple[int, tuple[str, ...], dict[str, tuple[bytes, int]]]:
        """What `global_step`, `contributors` and `counted` of a prepared round will be; a checkpoint needs them."""
        counted = {worker_id: key for worker_id, key in self.counted.items() if worker_id not in self._members}
        counted.update((worker_id, member.push.key) for worker_id, member in self._members.items())
        for worker_id in list(counted)[: max(0, len(counted) - _MAX_NAMES)]:  # the last counted come last
            del counted[worker_id]
        return self._base_step + 1, tuple(sorted(self._members)), counted

    def commit(self, now_s: float) -> Commit:
        """A prepared round is over. If this raises, `global_step` is what it was, and the round has to be abandoned."""
        assert self._prepared
        untouched = self._untouched()
        global_step, contributors, counted = self.as_committed()
        verdicts, late_s = {}, list[float]()
        for member in self._members.values():
            assert member.completed_at_s is not None
            assert self._enough_at_s is not None
            if member.completed_at_s > self._enough_at_s:
                late_s.append(member.completed_at_s - self._enough_at_s)
            if member.stream is not None:
                outcome = Outcome.COMMITTED if member.attached == member.push else Outcome.ALREADY_COUNTED
                verdicts[member.stream] = Verdict(outcome, now_s - member.completed_at_s)
        commit = Commit(global_step, contributors, untouched, verdicts, tuple(self._held), self.age_s(now_s))
        contributions = [0] * self.fragment_count
        self._lateness.observe(late_s)
        self._barred.clear()
        self._clear(contributions)
        self._knows_workers = True
        # Last, for whatever fails before leaves a round that can be abandoned.
        self.global_step, self.contributors, self.counted = global_step, contributors, counted
        return commit

    def abandon(self) -> None:
        """The shell failed at something: the round starts over, whatever state it is in, and forgets its streams."""
        self._clear([0] * self.fragment_count)

    @property
    def due_at_s(self) -> float | None:
        """When `expire` has something to do; None if nothing but an event can change anything."""
        due_at_s = [] if (over_at_s := self._grace_over_at_s) is None else [over_at_s]
        if self.policy.round_timeout_s is not None:
            due_at_s += [since_s + self.policy.round_timeout_s for since_s in self._waiting_since_s().values()]
        return min(due_at_s, default=None)

    def expire(self, now_s: float) -> list[Decision]:
        """Time has passed."""
        decisions = list[Decision]()
        over_at_s = self._grace_over_at_s
        if over_at_s is not None and now_s >= over_at_s:
            enough = self._enough_at_s is not None
            decisions += self._go_on_without_the_missing(now_s) if enough else self._let_in_the_held()
        if self._prepared and decisions:
            return decisions  # their wait is over, too
        timeout_s = self.policy.round_timeout_s
        if timeout_s is not None:
            waiting_since_s = self._waiting_since_s()
            late = tuple(stream for stream, since_s in waiting_since_s.items() if now_s >= since_s + timeout_s)
            for stream in late:
                self.close(stream, now_s)
            decisions += [TimeOut(late, timeout_s)] if late else []
        return decisions

    # What the status shows.

    @property
    def job_is_over(self) -> bool:
        """Whether all workers have finished."""
        return len(self.finished) >= self.policy.num_workers and not self._members and not self._expected

    @property
    def training(self) -> int:
        """How many workers have not finished; 1 if only those that are not counted among the `num_workers` have not."""
        return 0 if self.job_is_over else max(1, self.policy.num_workers - len(self.finished))

    def holds(self, stream: int) -> bool:
        """Whether a stream belongs to the round in progress, or waits for its end."""
        return stream in self._streams or stream in self._held

    @property
    def under_way(self) -> bool:
        """Whether a push of the round in progress has come."""
        return self._started_at_s is not None

    def age_s(self, now_s: float) -> float:
        """Seconds since the first push of the round in progress; 0 if none has come."""
        return 0.0 if self._started_at_s is None else now_s - self._started_at_s

    def given(self, worker_id: str) -> int:
        """Fragments that a worker has given to the round in progress."""
        member = self._members.get(worker_id)
        return 0 if member is None else member.given

    @property
    def complete(self) -> frozenset[str]:
        """Workers whose push in the round in progress is whole."""
        return frozenset(w for w, member in self._members.items() if member.completed_at_s is not None)

    @property
    def full(self) -> bool:
        """Whether every worker that the round waits for has opened a push and is still there or has given all."""
        return self._closed and all(
            member.stream is not None or member.completed_at_s is not None for member in self._members.values()
        )

    @property
    def waits_for(self) -> tuple[frozenset[str], int]:
        """Whose pushes are not whole yet, as far as it knows names; and how many more it needs."""
        present = self._members.keys() | (set() if self._closed else self._expected.keys() - self._barred)
        return frozenset(present - self.complete), max(0, self._needed - len(present))

    # The rules.

    def _member_of(self, stream: int) -> _Member | None:
        """None for a stream that has nothing to give: its round has committed, or it only gets the center."""
        worker_id = self._streams.get(stream)
        return None if worker_id is None else self._members[worker_id]

    def _has_begun(self, member: _Member) -> bool:
        return member.given > 0 or member.completed_at_s is not None

    def _in_half(self, member: _Member) -> bool:
        return 0 < member.given < self.fragment_count

    def _is_gone(self, member: _Member) -> bool:
        return member.stream is None and self._in_half(member)

    def _has_left(self, worker_id: str) -> bool:
        """Whether it said so: if it is in the middle of its push, that is never completed."""
        return worker_id in self.finished or not (self.policy.is_strict or worker_id in self._expected)

    @property
    def _needed(self) -> int:
        """How many workers a round needs before it can close of itself."""
        return self._possible(self.policy.min_workers if self._knows_workers else self.policy.num_workers)

    def _possible(self, workers: int) -> int:
        """As many, or as many as are left without those that have finished."""
        absent = len(self.finished - self._members.keys()) if self.finished else 0
        return min(workers, max(1, self.policy.num_workers - absent))

    @property
    def _grace_s(self) -> float:
        return self._lateness.grace_s if self.policy.grace_s is None else self.policy.grace_s

    @property
    def _grace_over_at_s(self) -> float | None:
        """When those who are there have waited long enough for those who are not."""
        if self._prepared:
            return None
        if self._enough_at_s is not None:
            return self._enough_at_s + self._grace_s
        if not self._held:
            return None
        gone_at_s = [member.gone_at_s for member in self._members.values() if self._is_gone(member)]
        since_s = min(gone_at_s, default=None) if self._closed else self._barred_at_s
        return None if since_s is None else since_s + self._grace_s

    def _waiting_since_s(self) -> dict[int, float]:
        """Since when streams that have nothing to do have waited."""
        waiting = {
            member.stream: max(member.attached_at_s, member.completed_at_s)
            for member in self._members.values()
            if member.stream is not None and member.completed_at_s is not None
        }
        return waiting | {stream: since_s for stream, (_, since_s) in self._held.items()}

    def _agree_on_base_step(self, push: Push) -> list[Decision]:
        if not (self._members or self._held) or push.base_step == self._base_step:
            return []
        if push.base_step > self._base_step:
            raise self._ahead(f"{push.worker_id!r} pushes from base step {push.base_step}")
        error = self._ahead(f"others push from base step {self._base_step}, {push.worker_id!r} from {push.base_step}")
        return self._start_over(f"{push.worker_id!r} pushes from an earlier base step than the others", error)

    def _ahead(self, what: str) -> ModelAverageError:
        return refusal(
            Reason.BASE_STEP_AHEAD,
            f"{what}, but the server is at global_step {self.global_step}, restored from an older checkpoint "
            "or initialized anew; pull the center and go on from it",
        )

    def _make_room(self, newcomer: str) -> list[Decision]:
        """Decisions that let one more worker in, if none may come any more; raises if there are none."""
        held = {push.worker_id for push, _ in self._held.values()} - self._barred
        if len(held | {*self._members, newcomer}) <= self.policy.max_workers:
            return []
        for worker_id, member in self._members.items():
            if self._is_gone(member):
                return self._restart(f"{newcomer!r} takes the place of {worker_id!r}, whose push broke off")
        raise refusal(
            Reason.ROUND_FULL,
            f"{newcomer!r} is one too many for round {self.global_step}, which has its {self.policy.max_workers} "
            f"workers ({listed(sorted(self._members))}); start the server with a higher --num-workers "
            "or --max-workers",
        )

    def _check_rivals(self, member: _Member, push: Push) -> None:
        if member.attached is not None and member.attached.incarnation != push.incarnation:
            raise refusal(
                Reason.WORKER_ID_IN_USE,
                f"worker id {push.worker_id!r} is in use by another live process; give every worker its own",
            )
        for other in (member.attached, member.push):
            if other is not None and other.incarnation == push.incarnation and other.push_id > push.push_id:
                raise refusal(
                    Reason.PUSH_SUPERSEDED,
                    f"push {push.push_id} of {push.worker_id!r} comes late: push {other.push_id} is in the round",
                )

    def _detach_older(self, member: _Member) -> list[Decision]:
        older = member.stream
        if older is None:
            return []
        del self._streams[older]
        member.stream = member.attached = None
        worker_id = member.push.worker_id
        return [Dismiss(older, refusal(Reason.PUSH_SUPERSEDED, f"a newer call of {worker_id!r} took this one's place"))]

    def _restart(self, cause: str) -> list[Decision]:
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} was started over: {cause}; push again")
        return self._start_over(cause, error)

    def _restart_without(self, worker_id: str) -> list[Decision]:
        return self._restart(f"{worker_id!r} left in the middle of its push")

    def _start_over(self, cause: str, error: ModelAverageError) -> list[Decision]:
        dismissed = [Dismiss(stream, error) for stream in (*self._streams, *self._held)]
        self._clear([0] * self.fragment_count)
        return [Restart(cause), *dismissed]

    def _remove(self, worker_id: str, now_s: float) -> list[Decision]:
        """A worker that has given nothing is no longer in the round, which may have room for others again."""
        del self._members[worker_id]
        self._closed = False
        if not self._members:
            self._started_at_s = None
        return self._settle(None, now_s) + self._dismiss_held(f"{worker_id!r} left")

    def _dismiss_held(self, cause: str) -> list[Decision]:
        """Those who were held may push again: they will be let in."""
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} has room: {cause}; push again")
        free = [stream for stream, (push, _) in self._held.items() if push.worker_id not in self._barred]
        for stream in free:
            del self._held[stream]
        return [Dismiss(stream, error) for stream in free]

    def _let_in_the_held(self) -> list[Decision]:
        """The round cannot do without those whom it holds up."""
        gone = sorted(worker_id for worker_id, member in self._members.items() if self._is_gone(member))
        self._barred.clear()
        if not self._closed:
            return self._dismiss_held("others did not come back")
        for worker_id in gone:
            self._expected.pop(worker_id, None)
        return self._restart(f"the push of {listed(gone)} broke off")

    def _settle(self, member: _Member | None, now_s: float) -> list[Decision]:
        """Draws the consequences of who is there and who has given all; ``member`` may just have done so."""
        if self._prepared:
            return []
        if member is not None and member.given == self.fragment_count and member.completed_at_s is None:
            member.completed_at_s = now_s
            self._complete_count += 1
        if not self._closed:
            all_there = self._expected.keys() - self._barred <= self._members.keys()
            full = len(self._members) >= self.policy.max_workers
            self._closed = len(self._members) >= self._needed and (all_there or full)
        complete, least = self._complete_count, self._possible(self.policy.min_workers)
        if self._closed:  # one that had finished may have come back, too late for this round
            least = min(least, len(self._members))
        if complete >= least and self._enough_at_s is None:
            self._enough_at_s = now_s
        finished = self._finish()
        if not self._closed or complete < len(self._members):
            return finished
        self._prepared = True
        return [*finished, Prepare(self._base_step + 1)]

    def _finish(self) -> list[Decision]:
        """The fragments that all have given, once it is certain who they all are."""
        decisions = list[Decision]()
        while (
            self._closed
            and self._finished < self.fragment_count
            and self._contributions[self._finished] == len(self._members)
        ):
            total_weight = math.fsum(member.push.weight for member in self._members.values())
            if self._kept is None:  # once a round: there may be many fragments, and many variables
                self._kept = self._untouched()
            decisions.append(FinishFragment(self._finished, total_weight, self._kept))
            self._finished += 1
        return decisions

    def _go_on_without_the_missing(self, now_s: float) -> list[Decision]:
        """The time of grace is over: the round is that of the pushes that are whole."""
        complete = self.complete
        missing = {worker_id: member for worker_id, member in self._members.items() if worker_id not in complete}
        waiting = self._barred | {push.worker_id for push, _ in self._held.values()}
        late = ((self._expected.keys() - waiting) | missing.keys()) - complete
        for worker_id in late:
            self._expected.pop(worker_id, None)
        self._barred |= late
        self._barred_at_s, self._knows_workers = now_s, True
        cause = f"it waited {self._grace_s:g} s for {listed(sorted(late))}"
        if any(member.given > 0 for member in missing.values()):
            return self._restart(cause)
        error = refusal(Reason.ROUND_RESTARTED, f"round {self.global_step} goes on without you: {cause}; push again")
        decisions: list[Decision] = [Dismiss(m.stream, error) for m in missing.values() if m.stream is not None]
        for worker_id in missing:
            del self._members[worker_id]
        return decisions + self._settle(None, now_s)  # it commits: nobody is missing any more

    def _expect(self, push: Push) -> None:
        self.come_back(push.worker_id)
        if not self.policy.is_strict:
            self._expected.pop(push.worker_id, None)
            self._expected[push.worker_id] = push.incarnation
            if len(self._expected) > _MAX_NAMES:
                del self._expected[next(iter(self._expected))]

    def _clear(self, contributions: list[int]) -> None:
        self._members.clear()
        self._streams.clear()
        self._held.clear()
        self._contributions = contributions
        self._finished, self._complete_count, self._kept = 0, 0, None
        self._closed = self._prepared = False
        self._started_at_s = self._enough_at_s = None

    def _untouched(self) -> frozenset[int]:
        if self._base_step != self.global_step:
            return frozenset()  # the server's center is not the one that they left untouched
        return frozenset.intersection(*(member.push.untouched for member in self._members.values()))


def check_fragment_order(index: int, expected: int, fragment_count: int) -> None:
    """Raises ProtocolError (FRAGMENT_EXTRA, FRAGMENT_REPEATED or FRAGMENT_MISPLACED) unless ``index`` comes next."""
    if index >= fragment_count:
        raise refusal(
            Reason.FRAGMENT_EXTRA, f"fragment {index} does not exist; the model has {fragment_count} fragments"
        )
    if index < expected:
        raise refusal(Reason.FRAGMENT_REPEATED, f"fragment {index} came before; the first wanted is {expected}")
    if index > expected:
        raise refusal(Reason.FRAGMENT_MISPLACED, f"fragment {index} came where {expected} belongs")
