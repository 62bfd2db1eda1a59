"""A dumb oracle for the round: random processes, full records of who gave which fragment of which push, and averages
made of tagged contributions instead of numbers, so that a torn push or a double count shows."""

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
    Push,
    Restart,
    Verdict,
)
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided

__all__ = ["EVENTS", "Answer", "Committed", "Event", "Finished", "Given", "Ledger", "Play", "Process", "value_of"]


def value_of(push: Push, index: int) -> int:
    """What fragment ``index`` of a push holds: another small number for every push and place."""
    return (int.from_bytes(push.incarnation, "big") * 100 + push.push_id) * 10 + index


@dataclass(frozen=True)
class Given:
    """One contribution: fragment ``index`` of ``push``, added with ``weight``."""

    push: Push
    index: int
    weight: float

    @property
    def value(self) -> int:
        return value_of(self.push, self.index)


@dataclass(frozen=True)
class Finished:
    """A fragment of an average: whose contributions were summed, and what the sum was divided by."""

    contents: tuple[Given, ...]
    total_weight: float
    untouched: frozenset[int]

    @property
    def pushes(self) -> frozenset[Push]:
        return frozenset(given.push for given in self.contents)

    @property
    def average(self) -> float:
        """The value that this fragment of the center has."""
        return sum(given.weight * given.value for given in self.contents) / self.total_weight


@dataclass(frozen=True)
class Committed:
    """One committed round: what was decided, the center that came of it, and the pushes that were whole by then."""

    commit: Commit
    center: tuple[Finished | None, ...]
    whole: tuple[Push, ...]


@dataclass(frozen=True)
class Answer:
    """What an event led to, without the words."""

    admitted: int | None = None
    center_follows: Outcome | None = None
    refused: Reason | None = None
    restarted: bool = False
    dismissed: frozenset[tuple[int, Reason]] = frozenset()
    added: tuple[float, bool] | None = None


@dataclass
class Ledger:
    """Plain records of the round in progress, and what the rules want to happen next."""

    num_workers: int
    fragment_count: int
    global_step: int
    attached: dict[int, Push] = field(default_factory=dict)  # by stream
    given: dict[Push, list[int]] = field(default_factory=dict)
    whole_at_s: dict[Push, float] = field(default_factory=dict)
    counted: dict[str, Push] = field(default_factory=dict)
    base_step: int = 0  # of the pushes that are present
    started_at_s: float | None = None

    def begun(self, worker_id: str) -> Push | None:
        """The push of this worker that is in the sums, in part or whole."""
        return next((push for push in (*self.given, *self.whole_at_s) if push.worker_id == worker_id), None)

    def in_half(self, push: Push) -> bool:
        return 0 < len(self.given.get(push, ())) < self.fragment_count

    def present(self) -> set[str]:
        """Workers with a place in the round."""
        return {push.worker_id for push in (*self.attached.values(), *self.given, *self.whole_at_s)}

    def wanted(self, stream: int) -> int:
        """The fragment that the round wants next from this stream."""
        push = self.attached.get(stream)
        if push is None:
            return self.fragment_count
        return len(self.given.get(self.begun(push.worker_id) or push, ()))

    def status(self) -> tuple[frozenset[str], bool, bool]:
        """Whose push is whole, whether all are there or have given all, and whether anybody has come."""
        complete = frozenset(push.worker_id for push in self.whole_at_s)
        live = {push.worker_id for push in self.attached.values()}
        full = len(self.present()) == self.num_workers and self.present() <= live | complete
        return complete, full, bool(self.present())

    def expect_open(self, push: Push) -> Answer:
        counted = self.counted.get(push.worker_id)
        if counted is not None and counted.key == push.key:
            return Answer(center_follows=Outcome.ALREADY_COUNTED)
        if push.base_step < self.global_step:
            return Answer(center_follows=Outcome.STALE)
        mine = [stream for stream, other in self.attached.items() if other.worker_id == push.worker_id]
        if any(self.attached[stream].incarnation != push.incarnation for stream in mine):
            return Answer(refused=Reason.WORKER_ID_IN_USE)
        others = [self.attached[stream] for stream in mine] + [
            p for p in (self.begun(push.worker_id),) if p is not None
        ]
        if any(other.incarnation == push.incarnation and other.push_id > push.push_id for other in others):
            return Answer(refused=Reason.PUSH_SUPERSEDED)
        begun, present, restarted = self.begun(push.worker_id), self.present(), False
        if present and push.base_step > self.base_step:
            return Answer(refused=Reason.BASE_STEP_AHEAD)
        if present and push.base_step < self.base_step:
            everyone = frozenset((stream, Reason.BASE_STEP_AHEAD) for stream in self.attached)
            return Answer(0, restarted=True, dismissed=everyone)
        if push.worker_id in present:
            restarted = begun is not None and begun != push and self.in_half(begun)
        elif len(present) == self.num_workers:
            live = {other.worker_id for other in self.attached.values()}
            restarted = any(self.in_half(other) and other.worker_id not in live for other in self.given)
            if not restarted:
                return Answer(refused=Reason.ROUND_FULL)
        dismissed = {(stream, Reason.PUSH_SUPERSEDED) for stream in mine}
        if restarted:
            dismissed |= {(stream, Reason.ROUND_RESTARTED) for stream in self.attached if stream not in mine}
        first_needed = 0 if restarted or begun is None else len(self.given.get(begun, ()))
        return Answer(first_needed, restarted=restarted, dismissed=frozenset(dismissed))

    def expect_fragment(self, stream: int, index: int) -> Answer:
        wanted = self.wanted(stream)
        if index >= self.fragment_count:
            return Answer(refused=Reason.FRAGMENT_EXTRA)
        if index != wanted:
            return Answer(refused=Reason.FRAGMENT_REPEATED if index < wanted else Reason.FRAGMENT_MISPLACED)
        first = not any(index in indexes for indexes in self.given.values())
        return Answer(added=(self.attached[stream].weight, first))

    def expected_finish(self, index: int) -> FinishFragment | None:
        pushes = [push for push, indexes in self.given.items() if index in indexes]
        if len(pushes) < self.num_workers:
            return None
        untouched = self.untouched(pushes)
        return FinishFragment(index, sum(push.weight for push in pushes), untouched, self.base_step == self.global_step)

    def untouched(self, pushes: list[Push]) -> frozenset[int]:
        """What all left untouched, if they started from the center that the server has."""
        if self.base_step != self.global_step:
            return frozenset()
        return frozenset.intersection(*(push.untouched for push in pushes))

    def expected_commit(self, now_s: float) -> Commit | None:
        whole = {push.worker_id: push for push in self.whole_at_s}
        if len(whole) < self.num_workers or self.started_at_s is None:
            return None
        verdicts = {}
        for stream, push in self.attached.items():
            mine = whole[push.worker_id]
            outcome = Outcome.COMMITTED if mine == push else Outcome.ALREADY_COUNTED
            verdicts[stream] = Verdict(outcome, now_s - self.whole_at_s[mine])
        untouched = self.untouched(list(whole.values()))
        return Commit(self.base_step + 1, tuple(sorted(whole)), untouched, verdicts, (), now_s - self.started_at_s)

    def admit(self, stream: int, push: Push, now_s: float) -> None:
        if not self.present():
            self.base_step = push.base_step
        self.attached[stream] = push
        if self.started_at_s is None:
            self.started_at_s = now_s
        if self.fragment_count == 0 and self.begun(push.worker_id) is None:
            self.whole_at_s[push] = now_s

    def give(self, stream: int, index: int, now_s: float) -> None:
        push = self.attached[stream]
        self.given.setdefault(push, []).append(index)
        if len(self.given[push]) == self.fragment_count:
            self.whole_at_s[push] = now_s

    def close(self, stream: int) -> None:
        self.attached.pop(stream, None)
        if not self.present():
            self.started_at_s = None

    def start_over(self) -> None:
        self.given, self.whole_at_s, self.started_at_s = {}, {}, None

    def commit(self) -> None:
        self.counted |= {push.worker_id: push for push in self.whole_at_s}
        self.global_step = self.base_step + 1
        self.attached = {}
        self.start_over()


@dataclass
class Process:
    """A worker process as the server meets it. A restarted one has another incarnation."""

    worker_id: str
    incarnation: bytes
    base_step: int
    push: Push | None = None
    pushes: int = 0
    stream: int = 0  # the last one


@dataclass(frozen=True)
class Event:
    """Something that happens to one process; there are two under every worker id."""

    kind: str
    actor: int


_FREQUENCIES = {
    "push": 6,  # a first try, or a retry with the same header
    "give": 9,
    "give_all": 4,
    "whole": 5,  # push, and give all that is wanted
    "new_push": 2,  # abandons the push before
    "changed_header": 1,  # breaks the rule that one number stands for one push
    "counted_again": 1,
    "stale": 1,
    "ahead": 1,
    "wrong_fragments": 1,
    "half_close": 3,
    "break_off": 5,
    "restart": 3,  # the server has not noticed yet that the old process is gone
    "notice": 3,  # the server notices all that are gone
    "pull": 3,
}
# The first process of each of five ids, often; a second one under the same id, rarely.
_ACTORS = (0, 1, 2, 3, 4) * 3 + (5, 6)
EVENTS = [Event(kind, actor) for kind, times in _FREQUENCIES.items() for actor in _ACTORS for _ in range(times)]


class Play:
    """Plays events against a round, as the shell around it would, and keeps everything that happened."""

    def __init__(self, num_workers: int, fragment_count: int, global_step: int = 3) -> None:
        self.round = Round(RoundPolicy.strict(num_workers), fragment_count, global_step)
        self.ledger = Ledger(num_workers, fragment_count, global_step)
        self.now_s = 0.0
        self.steps = [global_step]
        self.commits: list[Committed] = []
        self.centers: list[tuple[Finished | None, ...]] = []  # what a reader saw after each event
        self.whole_pushes: list[int] = []  # how many were whole, but not committed, after each event
        self.surprises: list[tuple[object, object]] = []  # expected, but happened
        self.left_unchanged: list[tuple[Outcome | Reason, bool]] = []
        self.stale_admissions: list[Push] = []
        self.admitted: list[int] = []
        self.last_words: list[tuple[int, Outcome | Reason]] = []
        self.closed: set[int] = set()
        self.decisions: list[Decided] = []
        self._gone: list[int] = []  # streams that have ended; the round has not been told
        self._sums: list[list[Given]] = [[] for _ in range(fragment_count)]
        self._center: list[Finished | None] = [None] * fragment_count
        self._next: list[Finished | None] = [None] * fragment_count
        self._incarnations = self._streams = 0
        ids = [f"w{number}" for number in range(num_workers + 1)]  # one too many
        self.processes = [Process(name, self._incarnation(), global_step) for _ in range(2) for name in ids]

    def happen(self, event: Event) -> None:
        self.now_s += 1.0
        getattr(self, event.kind)(self.processes[event.actor % len(self.processes)])
        self._compare(self.ledger.status(), (self.round.complete, self.round.full, self.round.under_way))
        self.steps.append(self.round.global_step)
        self.centers.append(tuple(self._center))
        self.whole_pushes.append(len(self.ledger.whole_at_s))

    # Events.

    def push(self, process: Process) -> None:
        process.push = process.push or self._new_push(process, process.base_step)
        self._open(process, process.push)

    def new_push(self, process: Process) -> None:
        process.push = self._new_push(process, process.base_step)
        self._open(process, process.push)

    def changed_header(self, process: Process) -> None:
        if (old := process.push) is not None:
            weight = old.weight + 1
            self._open(process, Push(old.worker_id, old.incarnation, old.push_id, old.base_step, weight, old.untouched))

    def counted_again(self, process: Process) -> None:
        if process.worker_id in self.ledger.counted:
            self._open(process, self.ledger.counted[process.worker_id])

    def stale(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step - 1))

    def ahead(self, process: Process) -> None:
        self._open(process, self._new_push(process, self.round.global_step + 1))

    def give(self, process: Process) -> None:
        self._fragment(process.stream, self.ledger.wanted(process.stream))

    def give_all(self, process: Process) -> None:
        for _ in range(self.ledger.wanted(process.stream), self.ledger.fragment_count):
            self.give(process)

    def whole(self, process: Process) -> None:
        if process.stream not in self.ledger.attached:
            self.push(process)
        self.give_all(process)

    def wrong_fragments(self, process: Process) -> None:
        wanted = self.ledger.wanted(process.stream)
        for index in range(self.ledger.fragment_count + 2):
            if index != wanted:
                self._fragment(process.stream, index)

    def half_close(self, process: Process) -> None:
        before = repr(self.round)
        whole = self.ledger.wanted(process.stream) == self.ledger.fragment_count
        expected, answer = Answer(refused=None if whole else Reason.FRAGMENT_MISSING), Answer()
        try:
            self.round.check_complete(process.stream)
        except ModelAverageError as error:
            answer = self._refused(error, before)
            self.break_off(process)
        self._compare(expected, answer)

    def break_off(self, process: Process) -> None:
        self._close(process.stream)

    def restart(self, process: Process) -> None:
        self._gone.append(process.stream)
        process.incarnation, process.stream, process.push, process.pushes = self._incarnation(), 0, None, 0
        self.pull(process)

    def notice(self, _: Process) -> None:
        for stream in self._gone:
            self._close(stream)
        self._gone.clear()

    def pull(self, process: Process) -> None:
        process.base_step = self.round.global_step

    # What the shell does.

    def _open(self, process: Process, push: Push) -> None:
        self._streams += 1
        stream, expected, before = self._streams, self.ledger.expect_open(push), repr(self.round)
        try:
            decisions = self.round.open(stream, push, self.now_s)
        except ModelAverageError as error:
            self._compare(expected, self._refused(error, before))
            if error.reason is Reason.BASE_STEP_AHEAD:
                self._give_up(process)
            return
        admission = next(d for d in decisions if isinstance(d, Admit | CenterFollows))
        if isinstance(admission, CenterFollows):
            self._compare(expected, Answer(center_follows=admission.outcome))
            self.left_unchanged.append((admission.outcome, repr(self.round) == before))
            if process.push == push:
                process.push, process.base_step = None, self.round.global_step
            return
        process.push, process.stream = push, stream
        dismissed = frozenset((d.stream, _reason(d.error)) for d in decisions if isinstance(d, Dismiss))
        restarted = any(isinstance(d, Restart) for d in decisions)
        self._compare(expected, Answer(admission.first_needed, restarted=restarted, dismissed=dismissed))
        self._apply(decisions, stream, push)

    def _fragment(self, stream: int, index: int) -> None:
        expected, before = self.ledger.expect_fragment(stream, index), repr(self.round)
        try:
            decisions = self.round.take_fragments(stream, index, index + 1, self.now_s)
        except ModelAverageError as error:
            self._compare(expected, self._refused(error, before))
            return
        accumulate = decisions[0]
        assert isinstance(accumulate, Accumulate)
        weight, first = accumulate.weight, accumulate.how is Addition.START
        self._compare(expected, Answer(added=(weight, first)))
        push = self.ledger.attached[stream]
        if first:
            self._sums[index].clear()
        self._sums[index].append(Given(push, index, weight))
        self.ledger.give(stream, index, self.now_s)
        finished = next((d for d in decisions if isinstance(d, FinishFragment)), None)
        self._compare(self.ledger.expected_finish(index), finished)
        self._apply(decisions, stream, push)

    def _apply(self, decisions: list[Decided], stream: int, push: Push) -> None:
        self.decisions += decisions
        for decision in decisions:
            match decision:
                case Admit():
                    self.admitted.append(stream)
                    if push.base_step < self.ledger.global_step:
                        self.stale_admissions.append(push)
                    self.ledger.admit(stream, push, self.now_s)
                case Dismiss(dismissed, error):
                    self.last_words.append((dismissed, _reason(error)))
                    self._gone.append(dismissed)
                    del self.ledger.attached[dismissed]
                    for process in self.processes:
                        if process.stream == dismissed and error.reason is Reason.BASE_STEP_AHEAD:
                            self._give_up(process)
                case Restart():
                    # The sums keep what they hold: the first contribution to each has to overwrite it.
                    self.ledger.start_over()
                case FinishFragment(index, total_weight, untouched):
                    self._next[index] = Finished(tuple(self._sums[index]), total_weight, untouched)
                case Commit():
                    self._compare(self.ledger.expected_commit(self.now_s), decision)
                    self._commit(decision)
        self._compare(None, self.ledger.expected_commit(self.now_s))

    def _commit(self, commit: Commit) -> None:
        # The next average is made over what was there before, as in the two buffers.
        self._center, self._next = self._next, self._center
        self.commits.append(Committed(commit, tuple(self._center), tuple(self.ledger.whole_at_s)))
        self.last_words += [(stream, verdict.outcome) for stream, verdict in commit.verdicts.items()]
        self._gone += commit.verdicts
        self.ledger.commit()
        for process in self.processes:
            if process.stream in commit.verdicts:
                process.push, process.base_step = None, commit.global_step

    def _give_up(self, process: Process) -> None:
        """A push from ahead was refused: the worker goes on from the center that there is."""
        process.push = None
        self.pull(process)

    def _close(self, stream: int) -> None:
        self._compare([], self.round.close(stream, self.now_s))
        self.closed.add(stream)
        self.ledger.close(stream)

    def _incarnation(self) -> bytes:
        self._incarnations += 1
        return self._incarnations.to_bytes(16, "big")

    def _new_push(self, process: Process, base_step: int) -> Push:
        process.pushes += 1
        mix = process.pushes + process.incarnation[-1]
        untouched = frozenset(variable for variable in range(3) if mix >> variable & 3)
        return Push(process.worker_id, process.incarnation, process.pushes, base_step, 1.0 + mix % 3, untouched)

    def _refused(self, error: ModelAverageError, before: str) -> Answer:
        self.left_unchanged.append((_reason(error), repr(self.round) == before))
        return Answer(refused=_reason(error))

    def _compare(self, expected: object, happened: object) -> None:
        if expected != happened:
            self.surprises.append((expected, happened))


def _reason(error: ModelAverageError) -> Reason:
    assert error.reason is not None
    return error.reason
