"""Inputs and outputs of the round: pushes, and decisions that the caller must carry out in order."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from modelaverage.checks import check_base_step, check_incarnation, check_weight, check_worker_id
from modelaverage.errors import ModelAverageError
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose

__all__ = [
    "Accumulate",
    "Addition",
    "Admit",
    "CenterFollows",
    "Commit",
    "Decision",
    "Dismiss",
    "FinishFragment",
    "Hold",
    "KeepFirst",
    "Prepare",
    "Push",
    "Restart",
    "TimeOut",
    "Verdict",
]


@dataclass(frozen=True)
class Push:
    """The contents of a push header. A push with an equal header carries equal bytes: it is a retry.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, INCARNATION_INVALID, WEIGHT_INVALID, GLOBAL_STEP_INVALID.
    """

    worker_id: str
    incarnation: bytes
    push_id: int
    base_step: int
    weight: float = 1.0
    untouched: frozenset[int] = frozenset()
    purpose: Purpose = Purpose.CONTRIBUTE

    def __post_init__(self) -> None:
        check_worker_id(self.worker_id)
        check_incarnation(self.incarnation)
        check_weight(self.weight)
        check_base_step(self.base_step)

    @property
    def key(self) -> tuple[bytes, int]:
        """Distinguishes this push from every other push of the same worker id."""
        return self.incarnation, self.push_id


@dataclass(frozen=True)
class Admit:
    """The push is part of the round; send its fragments from ``first_needed`` on. A push that abstains sends none."""

    first_needed: int


@dataclass(frozen=True)
class CenterFollows:
    """The push is not in the round: the worker receives the current center and continues from it."""

    outcome: Outcome


@dataclass(frozen=True)
class Hold:
    """The push is too late for the round in progress. It waits for the commit, then receives the center with outcome
    STALE."""


@dataclass(frozen=True)
class TimeOut:
    """These streams have waited for the round timeout. They end; the fragments that they delivered stay in the
    round."""

    streams: tuple[int, ...]
    waited_s: float


@dataclass(frozen=True)
class Dismiss:
    """The stream is no longer part of the round and must end with ``error``."""

    stream: int
    error: ModelAverageError


@dataclass(frozen=True)
class Restart:
    """The round starts over: all sums are discarded. Each of its streams also gets a `Dismiss`."""

    cause: str


class Addition(enum.Enum):
    """What to do with the values of a fragment that has arrived."""

    START = enum.auto()
    """They start the sum. Earlier contents of the sum, and additions still queued, are discarded."""
    ADD = enum.auto()
    """Add them to the sum."""
    IGNORE = enum.auto()
    """Drop them: a worker restores this fragment of the center, and the sum already holds it."""


@dataclass(frozen=True)
class Accumulate:
    """Put the values of fragment ``index``, which has just arrived, into its sum, multiplied by ``weight``.

    The ledger already counts the fragment. If adding fails, the sum is unknown: call `Round.abandon`.
    """

    index: int
    weight: float
    how: Addition


@dataclass(frozen=True)
class FinishFragment:
    """Every push has delivered fragment ``index`` or abstains: turn its sum into that fragment of the next center.

    Args:
        index: the fragment. A round finishes its fragments in order.
        total_weight: the divisor of the sum. 0: all pushes abstain, so there is no sum, and every variable keeps the
            center's value.
        untouched: indexes of the variables that keep the center's value.
        steps: whether the outer optimizer takes a step from the center to this average. If False, the average becomes
            the next center unchanged and the optimizer's state stays. That is so when the server does not have the
            center that the workers started from, and when a worker restores the next center.
    """

    index: int
    total_weight: float
    untouched: frozenset[int]
    steps: bool = True


@dataclass(frozen=True)
class KeepFirst:
    """The round is prepared but must be in a checkpoint first. Write `Round.as_committed` and the finished fragments,
    then call `Round.kept`. `Prepare` follows when the write ends or its timeout expires.

    Args:
        token: identifies the write in `Round.kept`.
    """

    token: int


@dataclass(frozen=True)
class Prepare:
    """Every push is whole and every fragment finished: allocate what the commit needs, then call `Round.commit`.

    Nothing visible has changed yet, so `Round.abandon` is still possible. Always the last decision in a list.

    Args:
        global_step: the step that the commit reaches.
    """

    global_step: int


@dataclass(frozen=True)
class Verdict:
    """The outcome of the commit for one attached stream."""

    outcome: Outcome
    waited_s: float


@dataclass(frozen=True)
class Commit:
    """What `Round.commit` returns. The round has ended: ``global_step`` rounds are complete.

    Args:
        global_step: the step reached.
        contributors: sorted ids of the workers whose pushes are in the center: all that did not abstain.
        present: ids of all workers in the round, including those that abstained.
        untouched: indexes of variables that no contributor changed.
        verdicts: by stream, for all attached streams, including those of workers that abstained.
        held: streams that waited for this commit; they receive this center with outcome STALE.
        round_s: seconds since the round's first push.
    """

    global_step: int
    contributors: tuple[str, ...]
    present: frozenset[str]
    untouched: frozenset[int]
    verdicts: dict[int, Verdict]
    held: tuple[int, ...]
    round_s: float


Decision = (
    Accumulate | Admit | CenterFollows | Dismiss | FinishFragment | Hold | KeepFirst | Prepare | Restart | TimeOut
)
