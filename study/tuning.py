"""Finds a learning rate: a pure function says which ones to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["best_rung", "rate_at", "rungs_to_try"]

_BASE, _FACTOR = 4e-3, 1.5
_FARTHEST_RUNG = 20


def rate_at(rung: int) -> float:
    """The learning rate of a rung of the ladder that all arms share: 0.004 times a power of 1.5."""
    return float(f"{_BASE * _FACTOR**rung:.3g}")


def rungs_to_try(losses: Mapping[int, float], first: int) -> tuple[int, ...]:
    """The rungs that are still to be tried: at first ``first`` and its neighbours, then the next one beyond the edge at
    which the best lies. Empty: the best lies between two that are worse.

    Args:
        losses: held-out loss by rung that was tried; one that is not finite is worse than all.
        first: where to begin.

    Raises:
        ValueError: the best lies at the edge of everything that is reasonable.
    """
    begin = tuple(rung for rung in (first, first - 1, first + 1) if rung not in losses)
    if begin:
        return begin
    best = best_rung(losses)
    if abs(best) > _FARTHEST_RUNG:
        raise ValueError(
            f"no learning rate is best: the loss still falls at {rate_at(best):g} ({losses[best]:g}); is the arm right?"
        )
    if best == max(losses):
        return (best + 1,)
    return (best - 1,) if best == min(losses) else ()


def best_rung(losses: Mapping[int, float]) -> int:
    """The rung with the least loss; the lowest of equals."""
    return min(sorted(losses), key=lambda rung: losses[rung] if math.isfinite(losses[rung]) else math.inf)
