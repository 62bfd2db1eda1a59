"""What a session returns to its user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ma_client.values.same import SameArrays, plain
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["InitializeResult", "PushResult", "push_result"]


@dataclass(frozen=True)
class InitializeResult:
    """Whose values the center holds.

    Args:
        initialized: True if this call set the center, False if it was set before and nothing was changed.
        global_step: rounds completed.
    """

    initialized: bool
    global_step: int


@dataclass(frozen=True)
class PushResult:
    """How a push ended. Whatever the outcome, the worker goes on from ``center``.

    Args:
        center: the center variables by name, nested as those that were pushed.
        global_step: rounds completed; the base step of what is trained from this center.
        outcome: COMMITTED, STALE (this push was not used) or ALREADY_COUNTED (an earlier one was). With several
            servers: STALE if any of them did not use it.
        contributors: ids of the workers in this center's average, on all servers, sorted.
        waited_s: seconds from this push being complete to the round's commit, on the last server.
        untouched: variables that no contributor had changed; the center's values were kept.
        lent: the same arrays as ``center`` as an object that is the same in later rounds, for the optimizer; None: they
            are copies.
    """

    center: Mapping[str, Any]
    global_step: int
    outcome: Outcome
    contributors: tuple[str, ...]
    waited_s: float
    untouched: frozenset[str]
    lent: SameArrays | None = field(default=None, repr=False, compare=False)


def push_result(
    outcomes: Sequence[pb.PushOutcome], center: Mapping[str, Any], global_step: int, untouched: frozenset[str]
) -> PushResult:
    """One result for a push to several servers: it ended as it did on the server where it ended worst.

    Args:
        outcomes: what each server answered.
        center: the center that came.
        global_step: of that center.
        untouched: variables that no contributor had changed on any server.
    """
    ended = {Outcome(outcome.outcome) for outcome in outcomes}
    worst = next(outcome for outcome in (Outcome.STALE, Outcome.ALREADY_COUNTED, Outcome.COMMITTED) if outcome in ended)
    on_all = frozenset.intersection(*(frozenset(outcome.contributors) for outcome in outcomes))
    waited_s = max(outcome.waited_s for outcome in outcomes)
    lent = center if isinstance(center, SameArrays) else None
    return PushResult(plain(center), global_step, worst, tuple(sorted(on_all)), waited_s, untouched, lent)
