"""What the leader of a worker group says to the other ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ma_client.job.results import PushResult
from modelaverage.errors import ModelAverageError

__all__ = ["GroupCall", "GroupDone", "GroupFailed", "GroupWaiting", "RankResult", "Standing", "result_of", "sendable"]


@dataclass(frozen=True)
class GroupCall:
    """All ranks do this now, and tell each other their results.

    Args:
        name: of what is to be done; see `Follower.answers`.
        arguments: for it.
    """

    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class GroupWaiting:
    """The leader still waits for the servers. Keeps the ranks' waits below their backend's timeout."""


@dataclass(frozen=True)
class Standing:
    """Where the worker is.

    Args:
        global_step: rounds completed.
        base_step: of the center that the worker has; None: it has none.
        has_begun: whether it has had a center.
        progress: what `Progress.state` of the leader gives.
        is_under_way: whether a round is under way while training goes on.
        last_round: how the last push ended, without the center; None: there was none.
    """

    global_step: int
    base_step: int | None
    has_begun: bool
    progress: dict[str, Any]
    is_under_way: bool
    last_round: PushResult | None


@dataclass(frozen=True)
class GroupDone:
    """What the ranks were called together for is done.

    Args:
        standing: None: the worker has none yet.
        value: for the other ranks.
    """

    standing: Standing | None = None
    value: Any = None


@dataclass(frozen=True)
class GroupFailed:
    """It has failed; all ranks raise this error.

    Args:
        error: from rank 0.
        standing: None: the worker has none yet.
    """

    error: Exception
    standing: Standing | None = None


@dataclass(frozen=True)
class RankResult:
    """What one rank did for a call.

    Args:
        value: what it has found.
        error: why it could not; None: it could.
    """

    value: Any = None
    error: Exception | None = None


def sendable(error: BaseException, rank: int) -> Exception:
    """The error of a rank as other processes can have it: of the same class if possible."""
    where = f"rank {rank} of the worker group"
    if not isinstance(error, Exception):
        return ModelAverageError(f"{where} was stopped ({type(error).__name__})")
    if isinstance(error, ModelAverageError) and rank > 0:
        error = type(error)(f"{where}: {error}", error.reason)
    try:
        copy = pickle.loads(pickle.dumps(error))  # as torch.distributed sends objects
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # any class may have any trouble with that
        return ModelAverageError(f"{where}: {type(error).__name__}: {error}")
    return ModelAverageError(f"{where}: {type(error).__name__}: {error}")


def result_of(work: Callable[[], Any], rank: int) -> RankResult:
    """What a rank has found, or its error."""
    try:
        return RankResult(work())
    except Exception as error:
        return RankResult(error=sendable(error, rank))
