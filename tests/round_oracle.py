"""A simple oracle for the round: plain records of all events, and what the rules require. Averages are made
of tagged contributions instead of numbers, so that a torn push or a double count shows."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from modelaverage.errors import Reason
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Commit, Push, Verdict
from ps_server.rules.policy import RoundPolicy

__all__ = ["Answer", "Committed", "Finished", "Given", "Records", "value_of"]


def value_of(push: Push, index: int) -> int:
    """The value of fragment ``index`` of a push: a different small number for every push and index."""
    return (int.from_bytes(push.incarnation, "big") * 100 + push.push_id) * 10 + index


@dataclass(frozen=True)
class Given:
    """Fragment ``index`` of ``push``, as it was added with ``weight``."""

    push: Push
    index: int
    weight: float

    @property
    def value(self) -> int:
        return value_of(self.push, self.index)


@dataclass(frozen=True)
class Finished:
    """A fragment of a center: what was summed, and what was to be done with the sum."""

    contents: frozenset[Given]
    total_weight: float
    untouched: frozenset[int]
    steps: bool

    @property
    def pushes(self) -> frozenset[Push]:
        return frozenset(given.push for given in self.contents)

    @property
    def average(self) -> float:
        return sum(given.weight * given.value for given in self.contents) / self.total_weight


@dataclass(frozen=True)
class Committed:
    """One committed round.

    Args:
        commit: what was decided.
        center: by fragment; None: nobody has set it yet.
        before: the center before.
        whole: the pushes that were whole, including those that abstained.
        excused: workers that had finished, at some time in this round.
        from_step: `global_step` before.
    """

    commit: Commit
    center: tuple[Finished | None, ...]
    before: tuple[Finished | None, ...]
    whole: tuple[Push, ...]
    excused: frozenset[str]
    from_step: int

    @property
    def base_step(self) -> int:
        """The purposes of all its pushes."""
        (base_step,) = {push.base_step for push in self.whole}
        return base_step


@dataclass(frozen=True)
class Answer:
    """What an event led to, without messages."""

    admitted: int | None = None
    held: bool = False
    center_follows: Outcome | None = None
    refused: Reason | None = None
    restarted: bool = False
    dismissed: frozenset[tuple[int, Reason]] = frozenset()
    timed_out: frozenset[int] = frozenset()
    commits: bool = False


@dataclass
class Records:
    """Everything about the round in progress that the rules speak of."""

    policy: RoundPolicy
    fragment_count: int
    global_step: int
    attached: dict[int, Push] = field(default_factory=dict)  # admitted streams
    held: dict[int, Push] = field(default_factory=dict)
    given: dict[Push, list[int]] = field(default_factory=dict)
    whole_at_s: dict[Push, float] = field(default_factory=dict)
    opened_at_s: dict[int, float] = field(default_factory=dict)  # by stream
    gone_at_s: dict[str, float] = field(default_factory=dict)  # of workers whose push broke off in the middle
    waited_for: dict[str, bytes] = field(default_factory=dict)  # showed up, and have not missed a round since
    missed: set[str] = field(default_factory=set)  # this round
    missed_at_s: float = 0.0
    finished: set[str] = field(default_factory=set)
    excused: set[str] = field(default_factory=set)  # had finished, at some time in this round
    knows_workers: bool = False
    closed: bool = False  # everything that the round waits for is there
    base_step: int = 0
    started_at_s: float | None = None
    quorum_at_s: float | None = None
    counted: dict[str, Push] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)

    # The workers that are there.

    def begun(self, worker_id: str) -> Push | None:
        """The push of this worker that is in the sums, in part or whole, or abstains."""
        return next((push for push in (*self.given, *self.whole_at_s) if push.worker_id == worker_id), None)

    def pushes(self) -> list[Push]:
        """One push of every present worker."""
        by_name = {push.worker_id: push for push in self.attached.values()}
        return list((by_name | {push.worker_id: push for push in (*self.given, *self.whole_at_s)}).values())

    def present(self) -> set[str]:
        return {push.worker_id for push in (*self.attached.values(), *self.given, *self.whole_at_s)}

    def live(self) -> set[str]:
        return {push.worker_id for push in self.attached.values()}

    def whole(self) -> set[str]:
        return {push.worker_id for push in self.whole_at_s}

    def halves(self) -> set[str]:
        """Workers whose push is in the sums in part."""
        return {push.worker_id for push in self.given} - self.whole()

    def gone(self) -> set[str]:
        """Workers whose push is partly in the sums, and that are not there to deliver the rest."""
        return self.halves() - self.live()

    def lost(self, name: str) -> bool:
        """Whether the worker has said goodbye, so that what its push lacks will never come."""
        return name in self.finished or (not self.policy.is_strict and name not in self.waited_for)

    def waiting_ids(self) -> set[str]:
        return {push.worker_id for push in self.held.values()}

    def wanted(self, stream: int) -> int:
        """The fragment that the round wants next from this stream."""
        push = self.attached.get(stream)
        return self.fragment_count if push is None else self.wanted_of(self.begun(push.worker_id) or push)

    def wanted_of(self, push: Push) -> int:
        abstains = push.purpose is Purpose.ABSTAIN
        return self.fragment_count if abstains else len(self.given.get(push, ()))

    def streams_of(self, worker_ids: set[str]) -> set[int]:
        return {stream for stream, push in self.attached.items() if push.worker_id in worker_ids}

    # What the rules want.

    @property
    def grace_s(self) -> float:
        if self.policy.grace_s is not None:
            return self.policy.grace_s
        recent_s = self.late_s[-200:]
        if len(recent_s) < 5:
            return 30.0
        median_s = statistics.median(recent_s)
        return max(0.5, median_s + 4 * statistics.median([abs(value - median_s) for value in recent_s]))

    def left(self, workers: int) -> int:
        """This many workers, or all that have not finished if they are fewer."""
        return min(workers, max(1, self.policy.num_workers - len(self.finished - self.present())))

    @property
    def needed(self) -> int:
        return self.left(self.policy.min_workers if self.knows_workers else self.policy.num_workers)

    @property
    def job_is_over(self) -> bool:
        return len(self.finished) >= self.policy.num_workers and not self.present() and not self.waited_for

    def waiting_since_s(self) -> dict[int, float]:
        """Streams that can do nothing but wait, and since when."""
        since_s = {stream: self.opened_at_s[stream] for stream in self.held}
        for stream, push in self.attached.items():
            begun = self.begun(push.worker_id)
            if begun in self.whole_at_s:
                since_s[stream] = max(self.opened_at_s[stream], self.whole_at_s[begun])
        return since_s

    def patience_ends_at_s(self) -> float | None:
        """When the round stops holding workers on account of others that are gone."""
        if not self.held or self.quorum_at_s is not None:
            return None
        since_s = [self.gone_at_s[worker_id] for worker_id in self.gone()] if self.closed else [self.missed_at_s]
        return min(since_s) + self.grace_s if since_s else None

    def due_at_s(self) -> float | None:
        """The next time at which time alone changes something."""
        due_at_s = [self.patience_ends_at_s()]
        if self.quorum_at_s is not None:
            due_at_s.append(self.quorum_at_s + self.grace_s)
        if self.policy.round_timeout_s is not None:
            due_at_s += [since_s + self.policy.round_timeout_s for since_s in self.waiting_since_s().values()]
        return min((at_s for at_s in due_at_s if at_s is not None), default=None)

    def can_commit(self) -> bool:
        return self.closed and self.present() == self.whole()

    def everyone(self, reason: Reason) -> frozenset[tuple[int, Reason]]:
        return frozenset((stream, reason) for stream in (*self.attached, *self.held))

    def starts_over(self) -> Answer:
        return Answer(restarted=True, dismissed=self.everyone(Reason.ROUND_RESTARTED))

    def expect_open(self, push: Push) -> Answer:
        name, counted = push.worker_id, self.counted.get(push.worker_id)
        if counted is not None and counted.key == push.key:
            return Answer(center_follows=Outcome.ALREADY_COUNTED)
        if push.base_step < self.global_step:
            return Answer(center_follows=Outcome.STALE)
        mine, begun = self.streams_of({name}), self.begun(name)
        if any(self.attached[stream].incarnation != push.incarnation for stream in mine):
            return Answer(refused=Reason.WORKER_ID_IN_USE)
        others = [self.attached[stream] for stream in mine] + [other for other in (begun,) if other is not None]
        if any(other.incarnation == push.incarnation and other.push_id > push.push_id for other in others):
            return Answer(refused=Reason.PUSH_SUPERSEDED)
        owes_nothing = push.purpose is Purpose.ABSTAIN
        if (self.present() or self.held) and push.base_step > self.base_step:
            return Answer(refused=Reason.BASE_STEP_AHEAD)
        if (self.present() or self.held) and push.base_step < self.base_step:
            dismissed = self.everyone(Reason.BASE_STEP_AHEAD)
            if name in self.missed:
                return Answer(held=True, restarted=True, dismissed=dismissed)
            return Answer(self.fragment_count if owes_nothing else 0, restarted=True, dismissed=dismissed)
        if name in self.missed:
            return Answer(held=True)
        restarted = False
        if name in self.present():
            restarted = name in self.halves() and begun != push
        elif len(self.present() | (self.waiting_ids() - self.missed) | {name}) > self.policy.max_workers:
            restarted = bool(self.gone())
            if not restarted:
                return Answer(refused=Reason.ROUND_FULL)
        elif self.closed:
            return Answer(held=True)
        superseded = {(stream, Reason.PUSH_SUPERSEDED) for stream in mine}
        if restarted:
            everyone = {*self.attached, *self.held}
            superseded |= {(stream, Reason.ROUND_RESTARTED) for stream in everyone - mine}
        first_needed = self.wanted_of(push if restarted or begun is None else begun)
        if restarted and not owes_nothing:
            first_needed = 0
        return Answer(first_needed, restarted=restarted, dismissed=frozenset(superseded))

    def expect_fragments(self, stream: int, first: int, end: int) -> Reason | None:
        """Why a run of fragments is refused; None: it is taken."""
        wanted = self.wanted(stream)
        if first >= self.fragment_count:
            return Reason.FRAGMENT_EXTRA
        if first != wanted:
            return Reason.FRAGMENT_REPEATED if first < wanted else Reason.FRAGMENT_MISPLACED
        return Reason.FRAGMENT_EXTRA if end > self.fragment_count else None

    def expect_expire(self, now_s: float) -> Answer:
        patience_ends_at_s = self.patience_ends_at_s()
        if self.quorum_at_s is not None and now_s >= self.quorum_at_s + self.grace_s:
            if self.halves():
                return self.starts_over()
            left = self.streams_of(self.present() - self.whole())
            return Answer(commits=True, dismissed=frozenset((stream, Reason.ROUND_RESTARTED) for stream in left))
        timed_out = self._timed_out(now_s)
        if patience_ends_at_s is not None and now_s >= patience_ends_at_s:
            if self.closed:
                return self.starts_over()
            let_in = frozenset((stream, Reason.ROUND_RESTARTED) for stream in self.held)
            return Answer(dismissed=let_in, timed_out=timed_out - set(self.held))
        return Answer(timed_out=timed_out)

    def _timed_out(self, now_s: float) -> frozenset[int]:
        timeout_s = self.policy.round_timeout_s
        if timeout_s is None:
            return frozenset()
        return frozenset(stream for stream, since_s in self.waiting_since_s().items() if now_s >= since_s + timeout_s)

    def expected_fragment(self, index: int) -> Finished:
        """The contributions to a finished fragment, once all are there."""
        pushes = self.pushes()
        restoring = sorted((p for p in pushes if p.purpose is Purpose.RESTORE), key=lambda push: push.worker_id)
        if restoring:
            return Finished(frozenset({Given(restoring[0], index, 1.0)}), 1.0, frozenset(), steps=False)
        contributing = [push for push in pushes if push.purpose is Purpose.CONTRIBUTE]
        contents = frozenset(Given(push, index, push.weight) for push in contributing)
        steps = bool(contributing) and self.base_step == self.global_step
        return Finished(contents, sum(push.weight for push in contributing), self.untouched(), steps)

    def untouched(self) -> frozenset[int]:
        """The variables that all contributors left untouched, if they started from the present center."""
        pushes = self.pushes()
        contributing = [push for push in pushes if push.purpose is Purpose.CONTRIBUTE]
        restores = any(push.purpose is Purpose.RESTORE for push in pushes)
        if restores or not contributing or self.base_step != self.global_step:
            return frozenset()
        return frozenset.intersection(*(push.untouched for push in contributing))

    def expected_commit(self, now_s: float) -> Commit | None:
        if not self.can_commit() or self.started_at_s is None:
            return None
        whole, verdicts = {push.worker_id: push for push in self.whole_at_s}, {}
        for stream, push in self.attached.items():
            mine = whole[push.worker_id]
            outcome = Outcome.COMMITTED if mine == push else Outcome.ALREADY_COUNTED
            verdicts[stream] = Verdict(outcome, now_s - self.whole_at_s[mine])
        names = tuple(sorted(name for name, push in whole.items() if push.purpose is not Purpose.ABSTAIN))
        round_s = now_s - self.started_at_s
        return Commit(
            self.base_step + 1, names, frozenset(whole), self.untouched(), verdicts, tuple(self.held), round_s
        )

    # Events.

    def show_up(self, push: Push) -> None:
        self.come_back(push.worker_id)
        if not self.policy.is_strict:
            self.waited_for[push.worker_id] = push.incarnation

    def come_back(self, name: str) -> None:
        self.finished = set() if self.job_is_over else self.finished - {name}
        if not self.closed and len(self.whole()) < self.left(self.policy.min_workers):
            self.quorum_at_s = None

    def come(self, stream: int, push: Push, now_s: float) -> None:
        """A stream was admitted or held."""
        if not self.present() and not self.held:
            self.base_step = push.base_step
        self.opened_at_s[stream] = now_s

    def admit(self, stream: int, push: Push, now_s: float) -> None:
        self.come(stream, push, now_s)
        self.attached[stream] = push
        self.gone_at_s.pop(push.worker_id, None)
        if self.started_at_s is None:
            self.started_at_s = now_s
        if self.wanted_of(push) == self.fragment_count and self.begun(push.worker_id) is None:
            self.whole_at_s[push] = now_s

    def give(self, stream: int, index: int, now_s: float) -> Push:
        push = self.attached[stream]
        push = self.begun(push.worker_id) or push
        self.given.setdefault(push, []).append(index)
        if len(self.given[push]) == self.fragment_count:
            self.whole_at_s[push] = now_s
        return push

    def close(self, stream: int, now_s: float) -> None:
        self.held.pop(stream, None)
        push = self.attached.pop(stream, None)
        if push is None:
            return
        if push.worker_id in self.gone():
            self.gone_at_s[push.worker_id] = now_s
        if push.worker_id not in self.present():
            self.closed = False
        if not self.present():
            self.started_at_s = None

    def finish(self, name: str) -> None:
        self.finished.add(name)
        self.excused.add(name)
        self.waited_for.pop(name, None)

    def grace_is_over(self, now_s: float) -> None:
        """Rounds no longer wait for workers that missed this one and are neither whole nor present."""
        late = ((self.waited_for.keys() - self.missed - self.waiting_ids()) | self.present()) - self.whole()
        self.missed |= late
        self.missed_at_s, self.knows_workers = now_s, True
        for name in late:
            self.waited_for.pop(name, None)

    def patience_is_over(self) -> None:
        self.missed.clear()
        if self.closed:
            for name in self.gone():
                self.waited_for.pop(name, None)

    def settle(self, now_s: float) -> None:
        """Closes the round, and starts the grace period."""
        present = self.present()
        all_there = self.waited_for.keys() - self.missed <= present or len(present) >= self.policy.max_workers
        self.closed = self.closed or (len(present) >= self.needed and all_there)
        enough = self.left(self.policy.min_workers)
        if self.closed:
            enough = min(enough, len(present))
        if len(self.whole_at_s) >= enough and self.quorum_at_s is None:
            self.quorum_at_s = now_s

    def start_over(self) -> None:
        self.attached, self.held, self.given, self.whole_at_s, self.gone_at_s = {}, {}, {}, {}, {}
        self.closed, self.started_at_s, self.quorum_at_s = False, None, None

    def commit(self) -> None:
        if self.quorum_at_s is not None:
            quorum_at_s = self.quorum_at_s
            self.late_s += [at_s - quorum_at_s for at_s in self.whole_at_s.values() if at_s > quorum_at_s]
        self.counted |= {push.worker_id: push for push in self.whole_at_s}
        self.global_step = self.base_step + 1
        self.knows_workers = True
        self.missed.clear()
        self.excused = set(self.finished)
        self.start_over()
