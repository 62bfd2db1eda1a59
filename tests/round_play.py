"""Plays events against a round, as the shell around it does, and compares what happens with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelaverage.errors import ModelAverageError, Reason
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose
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
)
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided
from tests.round_oracle import Answer, Committed, Finished, Given, Records

__all__ = ["EVENTS", "SECOND", "Event", "Play", "Process"]

# Between two events. Times are multiples of it, so that sums are exact.
_STEP_S = 0.25
# How often in a row `expire` may have something to do without an event in between.
_MOST_EXPIRIES = 20
# Actors from here on are second processes.
SECOND = 100
_MOST_VARIABLES = 3


@dataclass
class Process:
    """A worker process as the server sees it. A restarted one has another incarnation."""

    worker_id: str
    incarnation: bytes
    base_step: int
    push: Push | None = None
    pushes: int = 0
    stream: int = 0  # the last one


@dataclass(frozen=True)
class Event:
    """Something that happens to one process; every worker id has two processes."""

    kind: str
    actor: int


_FREQUENCIES = {
    "part": 16,  # push, if no push is under way, and give one fragment
    "whole": 10,  # push, if no push is under way, and give all that is wanted
    "push": 2,  # a first try, or a retry with the same header
    "new_push": 2,  # abandons the push before
    "changed_header": 1,  # breaks the rule that one number stands for one push
    "counted_again": 1,
    "stale": 1,
    "ahead": 1,
    "behind": 1,
    "wrong_fragments": 1,
    "half_close": 2,
    "break_off": 5,
    "restart": 2,  # the server has not noticed yet that the old process is gone
    "notice": 4,  # the server notices all processes that are gone
    "pull": 3,
    "leave": 2,
    "leave_unnoticed": 1,  # the server hears the goodbye before it notices the end of the stream
    "leave_again": 1,  # a goodbye of an earlier process of this name
    "finish": 2,
    "finish_unnoticed": 1,
    "finish_again": 1,
    "come_back": 1,
    "wait": 2,
    "until_due": 4,
    "too_early": 1,
    "busy": 2,  # the next event comes before the server has time for what is due
}
# Often the first process of an id, rarely the second one.
_ACTORS = (*range(5), *range(5), *range(5), SECOND, SECOND + 1)
EVENTS = [Event(kind, actor) for kind, times in _FREQUENCIES.items() for actor in _ACTORS for _ in range(times)]


class Play:
    """A round, the processes that meet it, and everything that has happened.

    Args:
        policy: of the round.
        fragment_count: of the model.
        purposes: what pushes are for, in turn.
        surplus: how many workers there are beyond those that may take part.
        global_step: where the round begins.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        fragment_count: int,
        purposes: Sequence[Purpose] = (Purpose.CONTRIBUTE,),
        surplus: int = 1,
        global_step: int = 3,
    ) -> None:
        self.round = Round(policy, fragment_count, global_step)
        self.records = Records(policy, fragment_count, global_step)
        self.now_s = 0.0
        self.commits: list[Committed] = []
        self.centers: list[tuple[Finished | None, ...]] = []  # what a reader saw after each event
        self.steps = [global_step]
        self.surprises: list[tuple[str, object, object]] = []  # what, what was expected, what happened
        self.changed: list[object] = []  # events that should have changed nothing, and did
        self.early: list[Commit] = []  # committed without somebody, before the grace period was over
        self.idle_expiries: list[float] = []  # nothing happened although something was due, or it is due again at once
        self.seen: set[object] = set()
        self.words: list[str] = []  # causes of restarts, and what the dismissed were told
        self.taken: list[int] = []  # streams that were admitted or held
        self.last_words: list[tuple[int, Outcome | Reason]] = []
        self.closed: set[int] = set()
        self._purposes = purposes
        self._gone: list[int] = []  # streams that have ended; the round has not been told
        self._sums: list[set[Given]] = [set() for _ in range(fragment_count)]
        self._center: list[Finished | None] = [None] * fragment_count
        self._next: list[Finished | None] = [None] * fragment_count
        self._finished = 0
        self._incarnations = self._streams = 0
        self._busy = False
        self._waited_for_at_first: set[str] = set()
        ids = [f"w{number}" for number in range(policy.max_workers + surplus)]
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

    # Events: pushes.

    def push(self, process: Process) -> None:
        process.push = process.push or self._new_push(process, process.base_step)
        self._open(process, process.push)

    def new_push(self, process: Process) -> None:
        process.push = self._new_push(process, process.base_step)
        self._open(process, process.push)

    def changed_header(self, process: Process) -> None:
        if (old := process.push) is not None:
            weight, purpose = old.weight + 1, self._purposes[process.pushes % len(self._purposes)]
            changed = Push(old.worker_id, old.incarnation, old.push_id, old.base_step, weight, old.untouched, purpose)
            self._open(process, changed)

    def counted_again(self, process: Process) -> None:
        if process.worker_id in self.records.counted:
            self._open(process, self.records.counted[process.worker_id])

    def stale(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step - 1))

    def ahead(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step + 2))

    def behind(self, process: Process) -> None:
        """Adds this process to those that were ahead together."""
        process.push, process.base_step = None, self.records.base_step

    def give(self, process: Process, most: int = 1) -> None:
        """The next fragments, if any are wanted."""
        stream, first = process.stream, self.records.wanted(process.stream)
        if stream in self.records.attached and first < self.records.fragment_count:
            self._fragments(stream, first, min(first + most, self.records.fragment_count))

    def part(self, process: Process) -> None:
        if process.stream not in self.records.attached and process.stream not in self.records.held:
            self.push(process)
        self.give(process)

    def whole(self, process: Process) -> None:
        self.part(process)
        self.give(process, self.records.fragment_count)

    def wrong_fragments(self, process: Process) -> None:
        count, wanted = self.records.fragment_count, self.records.wanted(process.stream)
        for first in range(count + 2):
            for end in (first + 1, count + 1):
                if first != wanted or end > count:
                    self._fragments(process.stream, first, end)

    def half_close(self, process: Process) -> None:
        before, refused = repr(self.round), False
        try:
            self.round.check_complete(process.stream)
        except ModelAverageError as error:
            refused = True
            self.seen.add(error.reason)
        self._compare("half-close", self.records.wanted(process.stream) < self.records.fragment_count, refused)
        self._note_change("half-close", before != repr(self.round))
        if refused:
            self.break_off(process)

    def break_off(self, process: Process) -> None:
        self._close(process.stream)

    # Events: processes.

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

    def finish(self, process: Process) -> None:
        self._close(process.stream)
        self._finish(process.worker_id, process.incarnation)
        self._renew(process)

    def finish_unnoticed(self, process: Process) -> None:
        self._gone.append(process.stream)
        self._finish(process.worker_id, process.incarnation)
        self._renew(process)

    def finish_again(self, process: Process) -> None:
        self._finish(process.worker_id, self._before[process.worker_id])

    def come_back(self, process: Process) -> None:
        self.round.come_back(process.worker_id)
        self.records.come_back(process.worker_id)
        self._check()

    # Events: time.

    def wait(self, process: Process) -> None:
        self.let_pass((1, 4, 16)[process.pushes % 3] * _STEP_S)

    def until_due(self, _: Process | None = None) -> None:
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

    # The shell.

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

    def _fragments(self, stream: int, first: int, end: int) -> None:
        expected, before = self.records.expect_fragments(stream, first, end), repr(self.round)
        try:
            decisions = self.round.take_fragments(stream, first, end, self.now_s)
        except ModelAverageError as error:
            self._compare("fragments", expected, error.reason)
            self._note_change(error.reason, before != repr(self.round))
            return
        self._compare("fragments", expected, None)
        indexes = [decision.index for decision in decisions if isinstance(decision, Accumulate)]
        self._compare("accumulated", list(range(first, end)), indexes)
        self._follow("fragments", Answer(), decisions, stream)

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
        its_own = begun is not None and (begun.incarnation == incarnation or was_last or records.lost(worker_id))
        expected = records.starts_over() if worker_id in records.gone() and its_own else Answer()
        self._follow("leave", expected, self.round.leave(worker_id, incarnation, self.now_s))

    def _finish(self, worker_id: str, incarnation: bytes) -> None:
        records, expected = self.records, Answer()
        mine = [records.attached[stream] for stream in records.streams_of({worker_id})]
        if all(push.incarnation == incarnation for push in mine):
            records.finish(worker_id)
            self._waited_for_at_first.discard(worker_id)
            if worker_id in records.gone():
                expected = records.starts_over()
        self._follow("finish", expected, self.round.finish(worker_id, incarnation, self.now_s))

    def _close(self, stream: int) -> None:
        records, was_closed = self.records, self.records.closed
        push = records.attached.get(stream)
        records.close(stream, self.now_s)
        expected = Answer()
        if push is not None and push.worker_id in records.gone() and records.lost(push.worker_id):
            expected = records.starts_over()
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
        waited_for = set(self.records.waited_for)
        if push is not None and not restarted:
            self.records.show_up(push)
        for decision in decisions:
            self.seen.add(type(decision))
            match decision:
                case Accumulate():
                    self._accumulate(self.records.give(stream, decision.index, self.now_s), decision)
                case Admit(first_needed) if push is not None:
                    admitted = first_needed
                    if self.records.started_at_s is None:
                        self._waited_for_at_first = waited_for - self.records.missed
                    self.records.admit(stream, push, self.now_s)
                case Hold() if push is not None:
                    held = True
                    self.records.come(stream, push, self.now_s)
                    self.records.held[stream] = push
                case Dismiss(other, error):
                    self.words.append(str(error))
                    dismissed.add((other, _reason(error)))
                    self._dismiss(other, _reason(error))
                case Restart(cause):
                    self.words.append(cause)
                    # The sums keep what they hold: the first contribution to each has to overwrite it.
                    self.records.start_over()
                    self._finished = 0
                    if push is not None:
                        self.records.show_up(push)
                case FinishFragment():
                    self.records.settle(self.now_s)
                    self._finish_fragment(decision)
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

    def _accumulate(self, push: Push, decision: Accumulate) -> None:
        self.seen.add(decision.how)
        if decision.how is Addition.START:
            self._sums[decision.index].clear()
        if decision.how is not Addition.IGNORE:
            self._sums[decision.index].add(Given(push, decision.index, decision.weight))

    def _dismiss(self, stream: int, reason: Reason) -> None:
        self.seen.add(reason)
        self.last_words.append((stream, reason))
        self._gone.append(stream)
        self.records.attached.pop(stream, None)
        self.records.held.pop(stream, None)
        for process in self.processes:
            if process.stream == stream and reason is Reason.BASE_STEP_AHEAD:
                self._give_up(process)

    def _finish_fragment(self, decision: FinishFragment) -> None:
        index, records = decision.index, self.records
        self._compare("finish in order", self._finished, index)
        self._finished += 1
        given = all(records.wanted_of(push) > index for push in records.pushes())
        self._compare("finish", (True, True), (records.closed, given))
        contents = frozenset(self._sums[index]) if decision.total_weight else frozenset()
        finished = Finished(contents, decision.total_weight, decision.untouched, decision.steps)
        self._compare("finished", records.expected_fragment(index), finished)
        self._next[index] = finished if contents else self._center[index]

    def _commit(self, commit: Commit) -> None:
        records = self.records
        self.seen |= {verdict.outcome for verdict in commit.verdicts.values()}
        self._compare("commit", records.expected_commit(self.now_s), commit)
        self._compare("all finished", records.fragment_count, self._finished)
        grace_over = records.quorum_at_s is not None and self.now_s >= records.quorum_at_s + records.grace_s
        absent = self._waited_for_at_first & records.waited_for.keys() - records.whole()
        if absent and not grace_over and len(records.whole()) < records.policy.max_workers:
            self.early.append(commit)
        before = tuple(self._center)
        self._center, self._next = self._next, self._center
        excused = frozenset(records.excused)
        whole, from_step = tuple(records.whole_at_s), records.global_step
        self.commits.append(Committed(commit, tuple(self._center), before, whole, excused, from_step))
        self._finished = 0
        self.last_words += [(stream, verdict.outcome) for stream, verdict in commit.verdicts.items()]
        self.last_words += [(stream, Outcome.STALE) for stream in commit.held]
        ended = {*commit.verdicts, *commit.held}
        self._gone += ended
        records.commit()
        for process in self.processes:
            if process.stream in ended:
                process.push, process.base_step = None, commit.global_step

    def _check(self) -> None:
        """Checks what holds after every event."""
        records, round_ = self.records, self.round
        records.settle(self.now_s)
        self.steps.append(round_.global_step)
        self.centers.append(tuple(self._center))
        self._compare("nothing left to commit", None, records.expected_commit(self.now_s))
        if records.closed:
            given = min(map(records.wanted_of, records.pushes()), default=0)
            self._compare("nothing left to finish", given, self._finished)
        self._compare("due", records.due_at_s(), round_.due_at_s)
        self._compare("complete", records.whole(), round_.complete)
        self._compare("has complete", bool(records.whole()), round_.has_complete)
        self._compare("finished", (records.finished, records.job_is_over), (round_.finished, round_.job_is_over))
        for stream in (*records.attached, *records.held):
            self._compare("holds", True, round_.holds(stream))
        full = records.closed and records.present() <= records.live() | records.whole()
        self._compare("full", (full, bool(records.present())), (round_.full, round_.under_way))
        wanted = records.present() | (set() if records.closed else records.waited_for.keys() - records.missed)
        self._compare("waits", (wanted - records.whole(), max(0, records.needed - len(wanted))), round_.waits_for)

    def _visible(self) -> object:
        """Everything that a push outside the round must not change."""
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
        """A push from ahead was refused: the worker continues from the present center."""
        process.push = None
        self.pull(process)

    def _incarnation(self) -> bytes:
        self._incarnations += 1
        return self._incarnations.to_bytes(16, "big")

    def _new_push(self, process: Process, base_step: int) -> Push:
        process.pushes += 1
        mix = process.pushes + process.incarnation[-1]
        untouched = frozenset(variable for variable in range(_MOST_VARIABLES) if mix >> variable & 3)
        purpose = self._purposes[mix % len(self._purposes)]
        return Push(
            process.worker_id, process.incarnation, process.pushes, base_step, 1.0 + mix % 3, untouched, purpose
        )

    def _note_change(self, what: object, changed: bool) -> None:
        self.seen.add(what)
        if changed:
            self.changed.append(what)

    def _compare(self, what: str, expected: object, happened: object) -> None:
        if expected != happened:
            self.surprises.append((what, expected, happened))


def _reason(error: ModelAverageError) -> Reason:
    assert error.reason is not None
    return error.reason
