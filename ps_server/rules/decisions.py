"""What goes into the round and what comes out: pushes, and decisions for the shell to carry out, in their order."""

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
    """What a push header says. Equal headers mean equal bytes: a retry.

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
    """The push is in the round, which wants its fragments from ``first_needed`` on. A push that abstains owes none."""

    first_needed: int


@dataclass(frozen=True)
class CenterFollows:
    """The push is not in the round: the worker gets the present center and goes on from it."""

    outcome: Outcome


@dataclass(frozen=True)
class Hold:
    """The push came too late for the round in progress: it waits for the commit, then gets the center as STALE."""


@dataclass(frozen=True)
class TimeOut:
    """These streams have waited for the others as long as a round may take: they end, and what they gave stays."""

    streams: tuple[int, ...]
    waited_s: float


@dataclass(frozen=True)
class Dismiss:
    """The stream is no longer part of the round and has to end with ``error``."""

    stream: int
    error: ModelAverageError


@dataclass(frozen=True)
class Restart:
    """The round starts over: everything accumulated is void. Each of its streams also gets a `Dismiss`."""

    cause: str


class Addition(enum.Enum):
    """What to do with the values of a fragment that has come."""

    START = enum.auto()
    """They start the sum. What lies there, or waits to be added, is void."""
    ADD = enum.auto()
    """Add them to the sum."""
    IGNORE = enum.auto()
    """Drop them: the sum already holds a center that is given back."""


@dataclass(frozen=True)
class Accumulate:
    """Put the values of fragment ``index``, which has just come, into its sum, multiplied by ``weight``.

    The ledger already has the fragment. If this cannot be done, the sum is unknown: call `Round.abandon`.
    """

    index: int
    weight: float
    how: Addition


@dataclass(frozen=True)
class FinishFragment:
    """Every push has given fragment ``index`` or owes none: turn its sum into the fragment of the next center.

    Args:
        index: which fragment. A round finishes its fragments in order.
        total_weight: what to divide the sum by. 0: there is no sum, because all pushes abstain; every variable keeps
            the center's value.
        untouched: indexes of the variables that keep the center's value.
        steps: whether the outer optimizer makes its step from the center and this average. False: the average is the
            next center as it is, and the optimizer's state stays; the server does not have the center that the workers
            started from, or one of them gives the next center back.
    """

    index: int
    total_weight: float
    untouched: frozenset[int]
    steps: bool = True


@dataclass(frozen=True)
class KeepFirst:
    """The round is prepared, but a checkpoint of it comes first: write what `Round.as_committed` and the finished
    fragments say, then call `Round.kept`. `Prepare` follows from that, or from the passing of time.

    Args:
        token: names the write to `Round.kept`.
    """

    token: int


@dataclass(frozen=True)
class Prepare:
    """Every push is whole, every fragment finished: get whatever the commit needs, then call `Round.commit`.

    Until then nothing has changed that anybody may hear of, and `Round.abandon` is possible. Always the last decision.

    Args:
        global_step: the step that the commit reaches.
    """

    global_step: int


@dataclass(frozen=True)
class Verdict:
    """What one attached stream is told about the commit."""

    outcome: Outcome
    waited_s: float


@dataclass(frozen=True)
class Commit:
    """What `Round.commit` returns. The round is over: ``global_step`` rounds are complete.

    Args:
        global_step: the step reached.
        contributors: sorted ids of the workers whose pushes made the center: all that did not abstain.
        present: ids of all workers that took part, those that abstained included.
        untouched: variables that none of them had changed.
        verdicts: by stream, for all that are attached, those that abstained included.
        held: streams that were held; they get this center as STALE.
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
