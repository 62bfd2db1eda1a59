"""What goes into the round and what comes out of it: pushes, and decisions for the shell to carry out."""

from __future__ import annotations

from dataclasses import dataclass

from modelaverage.checks import check_base_step, check_incarnation, check_weight, check_worker_id
from modelaverage.errors import ModelAverageError
from modelaverage.outcome import Outcome

__all__ = [
    "Admit",
    "CenterFollows",
    "Commit",
    "Decision",
    "Dismiss",
    "FinishFragment",
    "Hold",
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

    def __post_init__(self) -> None:
        check_worker_id(self.worker_id)
        check_incarnation(self.incarnation)
        check_weight(self.weight)
        check_base_step(self.base_step)

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
class Hold:
    """The push came too late for the round in progress: it waits for the commit, and then gets the center as STALE."""


@dataclass(frozen=True)
class TimeOut:
    """These streams have waited for the others as long as a round may take: they end, what they gave stays."""

    streams: tuple[int, ...]
    waited_s: float


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
        contributors: ids of the workers in the average, sorted.
        untouched: variables that none of them had changed.
        verdicts: by stream, for all that are attached.
        held: streams that were held; they get this center as STALE.
        round_s: seconds since the round's first push.
    """

    global_step: int
    contributors: tuple[str, ...]
    untouched: frozenset[int]
    verdicts: dict[int, Verdict]
    held: tuple[int, ...]
    round_s: float


Decision = Admit | CenterFollows | Hold | Dismiss | Restart | FinishFragment | Prepare | TimeOut
