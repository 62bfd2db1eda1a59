"""A dumb oracle for the round with a quorum: plain records of who did what and when, and what the rules want of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelaverage.errors import ModelAverageError, Reason
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import (
    Accumulate,
    Addition,
    Admit,
    CenterFollows,
    Commit,
    Dismiss,
    FinishFragment,
    Hold,
    Push,
    Restart,
    TimeOut,
    Verdict,
)
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided
from tests.round_oracle import Committed, Event, Finished, Given, Process

__all__ = ["EVENTS", "SECOND", "Plan", "Play", "Records"]

# Between two events. Times are multiples of it, so that sums are exact.
_STEP_S = 0.25
# So often in a row, without an event, has time something to do at most.
_MOST_EXPIRIES = 20
# Actors from here on are second processes.
SECOND = 100


def _grace_s(policy: RoundPolicy, late_s: list[float]) -> float:
    if policy.grace_s is not None:
        return policy.grace_s
    if len(late_s) < 5:
        return 30.0
    median_s = _median(late_s[-200:])
    return max(0.5, median_s + 4 * _median([abs(value - median_s) for value in late_s[-200:]]))


def _median(values: list[float]) -> float:
    ascending = sorted(values)
    middle = len(ascending) // 2
    return ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2


@dataclass(frozen=True)
class Answer:
    """What an event led to, without the words."""

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
    waited_for: dict[str, bytes] = field(default_factory=dict)  # who showed up, and has not missed a round since
    missed: set[str] = field(default_factory=set)  # this round
    missed_at_s: float = 0.0
    knows_workers: bool = False
    closed: bool = False  # all are there that it waits for
    base_step: int = 0
    started_at_s: float | None = None
    quorum_at_s: float | None = None
    counted: dict[str, Push] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)

    # Who is there.

    def begun(self, worker_id: str) -> Push | None:
        """The push of this worker that is in the sums, in part or whole."""
        return next((push for push in (*self.given, *self.whole_at_s) if push.worker_id == worker_id), None)

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
        """Workers whose push is in the sums in part, and who are not there to give the rest."""
        return self.halves() - self.live()

    def waiting_ids(self) -> set[str]:
        return {push.worker_id for push in self.held.values()}

    def wanted(self, stream: int) -> int:
        """The fragment that the round wants next from this stream."""
        push = self.attached.get(stream)
        if push is None:
            return self.fragment_count
        return len(self.given.get(self.begun(push.worker_id) or push, ()))

    def streams_of(self, worker_ids: set[str]) -> set[int]:
        return {stream for stream, push in self.attached.items() if push.worker_id in worker_ids}

    # What the rules want.

    @property
    def grace_s(self) -> float:
        return _grace_s(self.policy, self.late_s)

    def waiting_since_s(self) -> dict[int, float]:
        """Streams that can do nothing but wait, and since when."""
        since_s = {stream: self.opened_at_s[stream] for stream in self.held}
        for stream, push in self.attached.items():
            begun = self.begun(push.worker_id)
            if begun in self.whole_at_s:
                since_s[stream] = max(self.opened_at_s[stream], self.whole_at_s[begun])
        return since_s

    def patience_ends_at_s(self) -> float | None:
        """When the round no longer keeps workers out for the sake of others who are gone."""
        if not self.held or self.quorum_at_s is not None:
            return None
        since_s = [self.gone_at_s[worker_id] for worker_id in self.gone()] if self.closed else [self.missed_at_s]
        return min(since_s) + self.grace_s if since_s else None

    def due_at_s(self) -> float | None:
        """When time alone changes something."""
        due_at_s = [self.patience_ends_at_s()]
        if self.quorum_at_s is not None:
            due_at_s.append(self.quorum_at_s + self.grace_s)
        if self.policy.round_timeout_s is not None:
            due_at_s += [since_s + self.policy.round_timeout_s for since_s in self.waiting_since_s().values()]
        return min((at_s for at_s in due_at_s if at_s is not None), default=None)

    def can_commit(self) -> bool:
        return self.closed and self.present() == self.whole() and len(self.whole()) >= self.policy.min_workers

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
        everyone = {*self.attached, *self.held}
        if (self.present() or self.held) and push.base_step > self.base_step:
            return Answer(refused=Reason.BASE_STEP_AHEAD)
        if (self.present() or self.held) and push.base_step < self.base_step:
            dismissed = frozenset((stream, Reason.BASE_STEP_AHEAD) for stream in everyone)
            if name in self.missed:
                return Answer(held=True, restarted=True, dismissed=dismissed)
            return Answer(0, restarted=True, dismissed=dismissed)
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
            superseded |= {(stream, Reason.ROUND_RESTARTED) for stream in everyone - mine}
        first_needed = 0 if restarted or begun is None else len(self.given.get(begun, ()))
        return Answer(first_needed, restarted=restarted, dismissed=frozenset(superseded))

    def expect_expire(self, now_s: float) -> Answer:
        everyone = frozenset((stream, Reason.ROUND_RESTARTED) for stream in (*self.attached, *self.held))
        patience_ends_at_s = self.patience_ends_at_s()
        if self.quorum_at_s is not None and now_s >= self.quorum_at_s + self.grace_s:
            if self.halves():
                return Answer(restarted=True, dismissed=everyone)
            left = self.streams_of(self.present() - self.whole())
            return Answer(commits=True, dismissed=frozenset((stream, Reason.ROUND_RESTARTED) for stream in left))
        timed_out = self._timed_out(now_s)
        if patience_ends_at_s is not None and now_s >= patience_ends_at_s:
            if self.closed:
                return Answer(restarted=True, dismissed=everyone)
            let_in = frozenset((stream, Reason.ROUND_RESTARTED) for stream in self.held)
            return Answer(dismissed=let_in, timed_out=timed_out - set(self.held))
        return Answer(timed_out=timed_out)

    def _timed_out(self, now_s: float) -> frozenset[int]:
        timeout_s = self.policy.round_timeout_s
        if timeout_s is None:
            return frozenset()
        return frozenset(stream for stream, since_s in self.waiting_since_s().items() if now_s >= since_s + timeout_s)

    def expected_commit(self, now_s: float) -> Commit | None:
        if not self.can_commit() or self.started_at_s is None:
            return None
        whole, verdicts = {push.worker_id: push for push in self.whole_at_s}, {}
        for stream, push in self.attached.items():
            mine = whole[push.worker_id]
            outcome = Outcome.COMMITTED if mine == push else Outcome.ALREADY_COUNTED
            verdicts[stream] = Verdict(outcome, now_s - self.whole_at_s[mine])
        round_s, names = now_s - self.started_at_s, tuple(sorted(whole))
        return Commit(self.base_step + 1, names, self.untouched(), verdicts, tuple(self.held), round_s)

    def untouched(self) -> frozenset[int]:
        """What all left untouched, if they started from the center that the server has."""
        if self.base_step != self.global_step:
            return frozenset()
        pushes = [self.begun(name) for name in self.present()]
        return frozenset.intersection(*(push.untouched for push in pushes if push is not None))

    # What happened.

    def show_up(self, push: Push) -> None:
        if not self.policy.is_strict:
            self.waited_for[push.worker_id] = push.incarnation

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
        if self.fragment_count == 0 and self.begun(push.worker_id) is None:
            self.whole_at_s[push] = now_s

    def give(self, stream: int, index: int, now_s: float) -> None:
        push = self.attached[stream]
        push = self.begun(push.worker_id) or push
        self.given.setdefault(push, []).append(index)
        if len(self.given[push]) == self.fragment_count:
            self.whole_at_s[push] = now_s

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

    def grace_is_over(self, now_s: float) -> None:
        """Nobody waits any longer for those who are neither whole nor there since they missed it, or were too late."""
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
        """Closes the round, and starts the time of grace."""
        if len(self.whole_at_s) >= self.policy.min_workers and not self.policy.is_strict and self.quorum_at_s is None:
            self.quorum_at_s = now_s
        present = self.present()
        needed = self.policy.min_workers if self.knows_workers else self.policy.num_workers
        all_there = self.waited_for.keys() - self.missed <= present or len(present) >= self.policy.max_workers
        self.closed = self.closed or (len(present) >= needed and all_there)

    def start_over(self) -> None:
        self.attached, self.held, self.given, self.whole_at_s, self.gone_at_s = {}, {}, {}, {}, {}
        self.closed, self.started_at_s, self.quorum_at_s = False, None, None

    def commit(self) -> None:
        if self.quorum_at_s is not None:
            quorum_at_s = self.quorum_at_s
            self.late_s += [at_s - quorum_at_s for at_s in self.whole_at_s.values() if at_s > quorum_at_s]
        self.counted |= {push.worker_id: push for push in self.whole_at_s}
        self.global_step = self.base_step + 1
        self.knows_workers = not self.policy.is_strict
        self.missed.clear()
        self.start_over()


_FREQUENCIES = {
    "part": 16,  # push, if no push is under way, and give one fragment
    "whole": 8,  # push, if no push is under way, and give all that is wanted
    "push": 2,  # a first try, or a retry with the same header
    "new_push": 2,  # abandons the push before
    "counted_again": 1,
    "stale": 1,
    "ahead": 1,
    "behind": 1,
    "half_close": 1,
    "break_off": 5,
    "restart": 2,  # the server has not noticed yet that the old process is gone
    "notice": 4,  # the server notices all that are gone
    "pull": 3,
    "leave": 2,
    "leave_unnoticed": 1,  # the server hears the goodbye before it notices the end of the stream
    "leave_again": 1,  # a goodbye of an earlier process of this name
    "wait": 2,
    "until_due": 4,
    "too_early": 1,
    "busy": 2,  # the next event comes before the server has time for what is due
}
# The first process of an id, often; a second one under the same id, rarely.
_ACTORS = (*range(5), *range(5), *range(5), SECOND, SECOND + 1)
EVENTS = [Event(kind, actor) for kind, times in _FREQUENCIES.items() for actor in _ACTORS for _ in range(times)]


class Play:
    """Plays events against a round, as the shell around it would, and keeps everything that happened."""

    def __init__(self, policy: RoundPolicy, fragment_count: int, global_step: int = 3) -> None:
        self.round = Round(policy, fragment_count, global_step)
        self.records = Records(policy, fragment_count, global_step)
        self.now_s = 0.0
        self.commits: list[Committed] = []
        self.steps = [global_step]
        self.surprises: list[tuple[str, object, object]] = []  # what, expected, happened
        self.changed: list[object] = []  # what should have changed nothing, and did
        self.early: list[Commit] = []  # committed without somebody, before the time of grace was over
        self.idle_expiries: list[float] = []  # nothing happened although it was due, or it is due again at once
        self.seen: set[object] = set()
        self.words: list[str] = []  # causes of restarts, and what the dismissed were told
        self.taken: list[int] = []  # streams that were admitted or held
        self.last_words: list[tuple[int, Outcome | Reason]] = []
        self.closed: set[int] = set()
        self._gone: list[int] = []  # streams that have ended; the round has not been told
        self._sums: list[list[Given]] = [[] for _ in range(fragment_count)]
        self._next: list[Finished | None] = [None] * fragment_count
        self._finished = 0
        self._incarnations = self._streams = 0
        self._busy = False
        self._waited_for_at_first: set[str] = set()
        ids = [f"w{number}" for number in range(policy.max_workers + 1)]  # one too many
        self.processes = [Process(name, self._incarnation(), global_step) for _ in range(2) for name in ids]
        self._before = {process.worker_id: process.incarnation for process in self.processes}

    def add_processes(self, count: int) -> list[Process]:
        """Workers that nobody has heard of."""
        names = [f"new{number}" for number in range(count)]
        self.processes += [Process(name, self._incarnation(), self.round.global_step) for name in names]
        return self.processes[-count:]

    def happen(self, event: Event) -> None:
        self.let_pass(_STEP_S)
        count = len(self.processes) // 2
        second, actor = divmod(event.actor, SECOND)
        getattr(self, event.kind)(self.processes[second * count + actor % count])

    # Events.

    def push(self, process: Process) -> None:
        process.push = process.push or self._new_push(process, process.base_step)
        self._open(process, process.push)

    def new_push(self, process: Process) -> None:
        process.push = self._new_push(process, process.base_step)
        self._open(process, process.push)

    def counted_again(self, process: Process) -> None:
        if process.worker_id in self.records.counted:
            self._open(process, self.records.counted[process.worker_id])

    def stale(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step - 1))

    def ahead(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step + 2))

    def behind(self, process: Process) -> None:
        """Makes this process one of those that were ahead together."""
        process.push, process.base_step = None, self.records.base_step

    def give(self, process: Process) -> None:
        """The next fragment, if one is wanted."""
        stream = process.stream
        if stream not in self.records.attached or (index := self.records.wanted(stream)) == self.records.fragment_count:
            return
        push = self.records.attached[stream]
        push = self.records.begun(push.worker_id) or push
        first = not any(index in indexes for indexes in self.records.given.values())
        decisions = self.round.take_fragments(stream, index, index + 1, self.now_s)
        accumulate = decisions.pop(0)
        assert isinstance(accumulate, Accumulate)
        weight, is_first = accumulate.weight, accumulate.how is Addition.START
        self._compare("fragment", (push.weight, first), (weight, is_first))
        if is_first:
            self._sums[index].clear()
        self._sums[index].append(Given(push, index, weight))
        self.records.give(stream, index, self.now_s)
        self._follow("fragment", Answer(), decisions)

    def part(self, process: Process) -> None:
        if process.stream not in self.records.attached and process.stream not in self.records.held:
            self.push(process)
        self.give(process)

    def whole(self, process: Process) -> None:
        self.part(process)
        for _ in range(self.records.wanted(process.stream), self.records.fragment_count):
            self.give(process)

    def half_close(self, process: Process) -> None:
        before, refused = repr(self.round), False
        try:
            self.round.check_complete(process.stream)
        except ModelAverageError:
            refused = True
        self._compare("half-close", self.records.wanted(process.stream) < self.records.fragment_count, refused)
        self._note_change("half-close", before != repr(self.round))
        if refused:
            self.break_off(process)

    def break_off(self, process: Process) -> None:
        self._close(process.stream)

    def restart(self, process: Process) -> None:
        self._gone.append(process.stream)
        self._renew(process)

    def notice(self, _: Process) -> None:
        for stream in self._gone:
            self._close(stream)
        self._gone.clear()

    def pull(self, process: Process) -> None:
        process.base_step = self.round.global_step

    def leave(self, process: Process) -> None:
        self._close(process.stream)
        self._leave(process.worker_id, process.incarnation)
        self._renew(process)

    def leave_unnoticed(self, process: Process) -> None:
        self._gone.append(process.stream)
        self._leave(process.worker_id, process.incarnation)
        self._renew(process)

    def leave_again(self, process: Process) -> None:
        self._leave(process.worker_id, self._before[process.worker_id])

    def wait(self, process: Process) -> None:
        self.let_pass((1, 4, 16)[process.pushes % 3] * _STEP_S)

    def until_due(self, _: Process) -> None:
        if (due_at_s := self.round.due_at_s) is not None:
            self.let_pass(max(0.0, due_at_s - self.now_s))

    def too_early(self, _: Process) -> None:
        due_at_s, before = self.round.due_at_s, repr(self.round)
        if due_at_s is None or due_at_s > self.now_s:
            decisions = self.round.expire(self.now_s)
            self._note_change("early expiry", bool(decisions) or before != repr(self.round))

    def busy(self, _: Process) -> None:
        self._busy = True

    def let_pass(self, seconds: float) -> None:
        """Time passes. What is due happens when it is due, unless the server is busy."""
        end_at_s = self.now_s + seconds
        for _ in range(0 if self._busy else _MOST_EXPIRIES):
            due_at_s = self.round.due_at_s
            if due_at_s is None or due_at_s > end_at_s:
                break
            self.now_s = max(self.now_s, due_at_s)
            self._expire()
        self.now_s, self._busy = end_at_s, False

    # What the shell does.

    def _open(self, process: Process, push: Push) -> None:
        self._streams += 1
        stream, expected = self._streams, self.records.expect_open(push)
        before, visible = repr(self.round), self._visible()
        try:
            decisions = self.round.open(stream, push, self.now_s)
        except ModelAverageError as error:
            self._compare("open", expected, Answer(refused=_reason(error)))
            self._note_change(error.reason, before != repr(self.round))
            if error.reason is Reason.BASE_STEP_AHEAD:
                self._give_up(process)
            return
        answer = next(d for d in decisions if isinstance(d, Admit | Hold | CenterFollows))
        if isinstance(answer, CenterFollows):
            self._compare("open", expected, Answer(center_follows=answer.outcome))
            self.seen.add(answer.outcome)
            self._note_change(answer.outcome, len(decisions) > 1 or visible != self._visible())
            self.records.show_up(push)
            if process.push == push:
                process.push, process.base_step = None, self.round.global_step
            self._check()
            return
        if self.records.streams_of({push.worker_id}) == {process.stream}:
            self._gone.append(process.stream)
        process.push, process.stream = push, stream
        self.taken.append(stream)
        self._follow("open", expected, decisions, stream, push)

    def _expire(self) -> None:
        expected, records = self.records.expect_expire(self.now_s), self.records
        if records.quorum_at_s is not None and self.now_s >= records.quorum_at_s + records.grace_s:
            records.grace_is_over(self.now_s)
            if not expected.restarted:
                for stream, _ in expected.dismissed:
                    del records.attached[stream]
                    self._gone.append(stream)
                records.closed = True
        elif (patience_ends_at_s := records.patience_ends_at_s()) is not None and self.now_s >= patience_ends_at_s:
            records.patience_is_over()
        decisions = self.round.expire(self.now_s)
        self._follow("expire", expected, decisions)
        due_at_s = self.round.due_at_s
        if not decisions or (due_at_s is not None and due_at_s <= self.now_s):
            self.idle_expiries.append(self.now_s)

    def _leave(self, worker_id: str, incarnation: bytes) -> None:
        records, begun, was_last = self.records, self.records.begun(worker_id), False
        if records.waited_for.get(worker_id) == incarnation:
            del records.waited_for[worker_id]
            self._waited_for_at_first.discard(worker_id)
            was_last = True
        half = worker_id in records.gone() and begun is not None and (was_last or begun.incarnation == incarnation)
        everyone = frozenset((stream, Reason.ROUND_RESTARTED) for stream in (*records.attached, *records.held))
        expected = Answer(restarted=True, dismissed=everyone) if half else Answer()
        self._follow("leave", expected, self.round.leave(worker_id, incarnation, self.now_s))

    def _close(self, stream: int) -> None:
        records, was_closed = self.records, self.records.closed
        records.close(stream, self.now_s)
        expected, left = Answer(), records.gone() - records.waited_for.keys()
        if left and not records.policy.is_strict:
            everyone = frozenset((other, Reason.ROUND_RESTARTED) for other in (*records.attached, *records.held))
            expected = Answer(restarted=True, dismissed=everyone)
        elif was_closed and not records.closed:
            records.settle(self.now_s)
            if not records.can_commit():
                let_in = {stream for stream, push in records.held.items() if push.worker_id not in records.missed}
                expected = Answer(dismissed=frozenset((stream, Reason.ROUND_RESTARTED) for stream in let_in))
        self.closed.add(stream)
        self._follow("close", expected, self.round.close(stream, self.now_s))

    def _follow(
        self, what: str, expected: Answer, decisions: list[Decided], stream: int = 0, push: Push | None = None
    ) -> None:
        """Carries out decisions and compares them with what the rules want."""
        admitted, held, commits = None, False, False
        dismissed, timed_out = set[tuple[int, Reason]](), set[int]()
        restarted = any(isinstance(decision, Restart) for decision in decisions)
        for decision in decisions:
            self.seen.add(type(decision))
            match decision:
                case Admit(first_needed) if push is not None:
                    admitted = first_needed
                    if self.records.started_at_s is None:
                        self._waited_for_at_first = set(self.records.waited_for) - self.records.missed
                    self.records.admit(stream, push, self.now_s)
                    self.records.show_up(push)
                case Hold() if push is not None:
                    held = True
                    self.records.come(stream, push, self.now_s)
                    self.records.held[stream] = push
                    self.records.show_up(push)
                case Dismiss(other, error):
                    self.words.append(str(error))
                    dismissed.add((other, _reason(error)))
                    self._dismiss(other, _reason(error))
                case Restart(cause):
                    self.words.append(cause)
                    # The sums keep what they hold: the first contribution to each has to overwrite it.
                    self.records.start_over()
                    self._finished = 0
                case FinishFragment(index, total_weight, untouched):
                    self.records.settle(self.now_s)
                    self._finish(index, total_weight, untouched)
                case Commit():
                    commits = True
                    self.records.settle(self.now_s)
                    self._commit(decision)
                case TimeOut(streams, waited_s):
                    self._compare("waited", self.round.policy.round_timeout_s, waited_s)
                    timed_out.update(streams)
                    for other in streams:
                        self.seen.add(Reason.ROUND_TIMED_OUT)
                        self.last_words.append((other, Reason.ROUND_TIMED_OUT))
                        self._gone.append(other)
                        self.records.close(other, self.now_s)
        if commits and not expected.commits:  # that it was right to commit is compared with the records
            expected = Answer(**(vars(expected) | {"commits": True}))
        happened = Answer(
            admitted, held, None, None, restarted, frozenset(dismissed), frozenset(timed_out), commits=commits
        )
        self._compare(what, expected, happened)
        self._check()

    def _dismiss(self, stream: int, reason: Reason) -> None:
        self.seen.add(reason)
        self.last_words.append((stream, reason))
        self._gone.append(stream)
        self.records.attached.pop(stream, None)
        self.records.held.pop(stream, None)
        for process in self.processes:
            if process.stream == stream and reason is Reason.BASE_STEP_AHEAD:
                self._give_up(process)

    def _finish(self, index: int, total_weight: float, untouched: frozenset[int]) -> None:
        self._compare("finish in order", self._finished, index)
        self._finished += 1
        givers = {push.worker_id for push, indexes in self.records.given.items() if index in indexes}
        self._compare("finish", (True, self.records.present()), (self.records.closed, givers))
        self._compare("untouched", self.records.untouched(), untouched)
        self._next[index] = Finished(tuple(self._sums[index]), total_weight, untouched)

    def _commit(self, commit: Commit) -> None:
        records = self.records
        self.seen |= {verdict.outcome for verdict in commit.verdicts.values()}
        self._compare("commit", records.expected_commit(self.now_s), commit)
        self._compare("all finished", records.fragment_count, self._finished)
        grace_over = records.quorum_at_s is not None and self.now_s >= records.quorum_at_s + records.grace_s
        absent = self._waited_for_at_first & records.waited_for.keys() - set(commit.contributors)
        if absent and not grace_over and len(commit.contributors) < records.policy.max_workers:
            self.early.append(commit)
        self.commits.append(Committed(commit, tuple(self._next), tuple(records.whole_at_s)))
        self._next, self._finished = [None] * records.fragment_count, 0
        self.last_words += [(stream, verdict.outcome) for stream, verdict in commit.verdicts.items()]
        self.last_words += [(stream, Outcome.STALE) for stream in commit.held]
        ended = {*commit.verdicts, *commit.held}
        self._gone += ended
        records.commit()
        for process in self.processes:
            if process.stream in ended:
                process.push, process.base_step = None, commit.global_step

    def _check(self) -> None:
        """What holds after every event."""
        records, round_ = self.records, self.round
        records.settle(self.now_s)
        self.steps.append(round_.global_step)
        self._compare("nothing left to commit", None, records.expected_commit(self.now_s))
        if records.closed:
            given = [len(records.given.get(push, ())) for push in map(records.begun, records.present()) if push]
            whole = len(given) == len(records.present())
            self._compare("nothing left to finish", min(given, default=0) if whole else 0, self._finished)
        self._compare("due", records.due_at_s(), round_.due_at_s)
        self._compare("complete", records.whole(), round_.complete)
        for stream in (*records.attached, *records.held):
            self._compare("holds", True, round_.holds(stream))
        full = records.closed and records.present() <= records.live() | records.whole()
        self._compare("full", (full, bool(records.present())), (round_.full, round_.under_way))
        wanted = records.present() | (set() if records.closed else records.waited_for.keys() - records.missed)
        needed = records.policy.min_workers if records.knows_workers else records.policy.num_workers
        self._compare("waits", (wanted - records.whole(), max(0, needed - len(wanted))), round_.waits_for)

    def _visible(self) -> object:
        """All that a push which is not in the round must not change."""
        names = {process.worker_id for process in self.processes}
        given = {name: self.round.given(name) for name in names}
        streams = [stream for stream in range(self._streams + 1) if self.round.holds(stream)]
        round_ = self.round
        return given, streams, round_.complete, round_.global_step, round_.contributors, dict(round_.counted)

    def _renew(self, process: Process) -> None:
        """A new process takes the place of the old one, and pulls."""
        self._before[process.worker_id] = process.incarnation
        process.incarnation, process.stream, process.push, process.pushes = self._incarnation(), 0, None, 0
        self.pull(process)

    def _give_up(self, process: Process) -> None:
        """A push from ahead was refused: the worker goes on from the center that there is."""
        process.push = None
        self.pull(process)

    def _incarnation(self) -> bytes:
        self._incarnations += 1
        return self._incarnations.to_bytes(16, "big")

    def _new_push(self, process: Process, base_step: int) -> Push:
        process.pushes += 1
        mix = process.pushes + process.incarnation[-1]
        untouched = frozenset(variable for variable in range(3) if mix >> variable & 3)
        return Push(process.worker_id, process.incarnation, process.pushes, base_step, 1.0 + mix % 3, untouched)

    def _note_change(self, what: object, changed: bool) -> None:
        self.seen.add(what)
        if changed:
            self.changed.append(what)

    def _compare(self, what: str, expected: object, happened: object) -> None:
        if expected != happened:
            self.surprises.append((what, expected, happened))


@dataclass(frozen=True)
class Plan:
    """A job with a quorum, and what happens to it."""

    policy: RoundPolicy
    fragment_count: int
    events: tuple[Event, ...]

    def play(self) -> Play:
        play = Play(self.policy, self.fragment_count)
        for event in self.events:
            play.happen(event)
        return play


def _reason(error: ModelAverageError) -> Reason:
    assert error.reason is not None
    return error.reason
