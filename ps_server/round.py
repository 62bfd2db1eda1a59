"""The barrier as a pure state machine: events in, decisions out. No I/O, no clock, no tensors.

Rules (docs/architecture.md has the picture):

- Fragments of a push come in order, so how much of a push has come is one number, and what a broken push still lacks
  is everything from there on.
- A fragment is finished when `num_workers` distinct workers have given it; the round commits when all are. As every
  worker gives its fragments in order, finished fragments are a prefix, too.
- What was added to an average cannot be taken out. When a push that is partly in can never be completed, because its
  process is gone, the round starts over and everyone in it pushes again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modelaverage.checks import check_incarnation, check_weight, check_worker_id
from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.outcome import Outcome

__all__ = [
    "Admit",
    "CenterFollows",
    "Commit",
    "Decision",
    "Dismiss",
    "FinishFragment",
    "Push",
    "Restart",
    "Round",
    "Verdict",
    "check_fragment_order",
]


@dataclass(frozen=True)
class Push:
    """What a push header says. Equal headers mean equal bytes: a retry.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, INCARNATION_INVALID, WEIGHT_INVALID.
    """

    worker_id: str
    incarnation: bytes
    push_id: int
    base_step: int
    weight: float = 1.0
    untouched: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_worker_id(self.worker_id)
        check_incarnation(self.incarnation)
        check_weight(self.weight)

    @property
    def key(self) -> tuple[bytes, int]:
        """Tells this push from every other push of the same worker id."""
        return self.incarnation, self.push_id


@dataclass(frozen=True)
class Admit:
    """The push is in the round: fragments from ``first_needed`` on are wanted."""

    first_needed: int


@dataclass(frozen=True)
class CenterFollows:
    """The push is not in the round: the worker gets the present center and goes on from it."""

    outcome: Outcome


@dataclass(frozen=True)
class Dismiss:
    """The stream is no longer part of the round and has to end with ``error``."""

    stream: int
    error: ModelAverageError


@dataclass(frozen=True)
class Restart:
    """The round starts over: whatever was accumulated is void. Each of its streams gets a `Dismiss`, too."""

    cause: str


@dataclass(frozen=True)
class FinishFragment:
    """All have given fragment ``index``: divide it by ``total_weight``, but keep the ``untouched`` variables."""

    index: int
    total_weight: float
    untouched: frozenset[int]


@dataclass(frozen=True)
class Verdict:
    """What one attached stream is told about the commit."""

    outcome: Outcome
    waited_s: float


@dataclass(frozen=True)
class Commit:
    """The round is over: ``global_step`` rounds are complete.

    Args:
        global_step: the step reached.
        contributors: ids of the workers in the average, sorted.
        untouched: variables that none of them had changed.
        verdicts: by stream, for all that are attached.
        round_s: seconds since the round's first push.
    """

    global_step: int
    contributors: tuple[str, ...]
    untouched: frozenset[int]
    verdicts: dict[int, Verdict]
    round_s: float


Decision = Admit | CenterFollows | Dismiss | Restart | FinishFragment | Commit


@dataclass
class _Member:
    """A worker's line in the ledger of the round in progress."""

    push: Push
    given: int = 0  # fragments 0 .. given-1 are in the accumulators
    completed_at_s: float | None = None
    stream: int | None = None
    attached: Push | None = None  # what the attached stream came with: another push than the first, after a restart


@dataclass
class Round:
    """The ledger of the round in progress.

    Streams are named by numbers that the caller never uses twice. Every stream that `open` admitted has to be
    closed, however it ends.

    Args:
        num_workers: how many distinct workers a round waits for.
        fragment_count: how many fragments a whole push has; may be 0.
        global_step: rounds completed.
    """

    num_workers: int
    fragment_count: int
    global_step: int = 0
    contributors: tuple[str, ...] = ()  # of the last committed round
    _members: dict[str, _Member] = field(default_factory=dict, init=False)
    _streams: dict[int, str] = field(default_factory=dict, init=False)
    _contributions: list[int] = field(default_factory=list, init=False)  # by fragment
    _counted: dict[str, tuple[bytes, int]] = field(default_factory=dict, init=False)  # by worker, its last push
    _started_at_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._contributions = [0] * self.fragment_count

    def open(self, stream: int, push: Push, now_s: float) -> list[Decision]:
        """A push header came. Exactly one of the decisions is `Admit` or `CenterFollows`.

        Raises:
            ConflictError: BASE_STEP_AHEAD, WORKER_ID_IN_USE, PUSH_SUPERSEDED or ROUND_FULL; nothing has changed.
        """
        if self._counted.get(push.worker_id) == push.key:
            return [CenterFollows(Outcome.ALREADY_COUNTED)]
        if push.base_step < self.global_step:
            return [CenterFollows(Outcome.STALE)]
        if push.base_step > self.global_step:
            raise refusal(
                Reason.BASE_STEP_AHEAD,
                f"{push.worker_id!r} pushes from base step {push.base_step}, but the server is at global_step "
                f"{self.global_step}; pull the center and go on from it",
            )
        member, decisions = self._members.get(push.worker_id), list[Decision]()
        if member is None:
            decisions += self._make_room(push.worker_id)
        else:
            self._check_rivals(member, push)
            decisions += self._detach_older(member)
            if member.push != push and self._in_half(member):
                decisions += self._restart(f"{push.worker_id!r} pushes anew; its earlier push never came whole")
        member = self._members.setdefault(push.worker_id, _Member(push))
        if not self._has_begun(member):
            member.push = push
        member.stream, member.attached = stream, push
        self._streams[stream] = push.worker_id
        if self._started_at_s is None:
            self._started_at_s = now_s
        decisions.append(Admit(member.given))
        return decisions + self._settle(member, now_s)

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
        index = member.given
        member.given += 1
        self._contributions[index] += 1
        decisions = list[Decision]()
        if self._contributions[index] == self.num_workers:
            total_weight = math.fsum(m.push.weight for m in self._members.values())
            decisions.append(FinishFragment(index, total_weight, self._untouched()))
        return decisions + self._settle(member, now_s)

    def check_complete(self, stream: int) -> None:
        """The stream was half-closed. Raises ProtocolError (FRAGMENT_MISSING) if fragments are missing."""
        member = self._member_of(stream)
        if member is not None and member.given < self.fragment_count:
            raise refusal(
                Reason.FRAGMENT_MISSING,
                f"the push ended after {member.given} of {self.fragment_count} fragments; send the rest",
            )

    def close(self, stream: int) -> None:
        """The stream has ended, in whatever way. What it gave stays; a worker that gave nothing leaves the round."""
        worker_id = self._streams.pop(stream, None)
        if worker_id is None:
            return
        member = self._members[worker_id]
        member.stream = member.attached = None
        if not self._has_begun(member):
            del self._members[worker_id]
            if not self._members:
                self._started_at_s = None

    # What the status shows.

    def holds(self, stream: int) -> bool:
        """Whether a stream belongs to the round in progress."""
        return stream in self._streams

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
        return len(self._members) == self.num_workers and all(
            member.stream is not None or member.completed_at_s is not None for member in self._members.values()
        )

    # The rules.

    def _member_of(self, stream: int) -> _Member | None:
        """None for a stream that has nothing to give: its round has committed, or it only gets the center."""
        worker_id = self._streams.get(stream)
        return None if worker_id is None else self._members[worker_id]

    def _has_begun(self, member: _Member) -> bool:
        return member.given > 0 or member.completed_at_s is not None

    def _in_half(self, member: _Member) -> bool:
        return 0 < member.given < self.fragment_count

    def _make_room(self, newcomer: str) -> list[Decision]:
        if len(self._members) < self.num_workers:
            return []
        for worker_id, member in self._members.items():
            if member.stream is None and self._in_half(member):
                return self._restart(f"{newcomer!r} takes the place of {worker_id!r}, whose push broke off")
        raise refusal(
            Reason.ROUND_FULL,
            f"{newcomer!r} is one too many for round {self.global_step}, which has its {self.num_workers} workers "
            f"({', '.join(map(repr, sorted(self._members)))}); start the server with a higher --num-workers",
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
        dismissed = [Dismiss(stream, error) for stream in self._streams]
        self._clear()
        return [Restart(cause), *dismissed]

    def _settle(self, member: _Member, now_s: float) -> list[Decision]:
        """Marks a push that has become whole, and commits when it was the last."""
        if member.given < self.fragment_count:
            return []
        if member.completed_at_s is None:
            member.completed_at_s = now_s
        if len(self._members) < self.num_workers or any(m.completed_at_s is None for m in self._members.values()):
            return []
        return [self._commit(now_s)]

    def _commit(self, now_s: float) -> Commit:
        self.global_step += 1
        self.contributors = tuple(sorted(self._members))
        verdicts = {}
        for worker_id, member in self._members.items():
            self._counted[worker_id] = member.push.key
            if member.stream is not None and member.completed_at_s is not None:
                outcome = Outcome.COMMITTED if member.attached == member.push else Outcome.ALREADY_COUNTED
                verdicts[member.stream] = Verdict(outcome, now_s - member.completed_at_s)
        commit = Commit(self.global_step, self.contributors, self._untouched(), verdicts, self.age_s(now_s))
        self._clear()
        return commit

    def _clear(self) -> None:
        self._members.clear()
        self._streams.clear()
        self._contributions = [0] * self.fragment_count
        self._started_at_s = None

    def _untouched(self) -> frozenset[int]:
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
