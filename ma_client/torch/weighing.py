"""The weight of a worker's pushes: a number, or what the training loop has counted since the last round."""

from __future__ import annotations

import numbers
from collections.abc import Callable

from modelaverage.checks import check_weight
from modelaverage.errors import InvalidRequestError, Reason

__all__ = ["Weighing", "Weight"]

Weight = float | Callable[[], float]


class Weighing:
    """Asks for the weight of each contribution.

    Args:
        weight: the weight of every contribution; or a function that returns what was counted since its last call, such
            as tokens or samples. Then the weight of a contribution is all that was counted since the last round in
            which a center was installed; pushes that failed lose nothing. 0: nothing was counted, and the push
            abstains.

    Raises:
        InvalidRequestError: WEIGHT_INVALID: the number is not from 1e-9 to 1e9.
        TypeError: it is neither a number nor callable.
    """

    def __init__(self, weight: Weight) -> None:
        self._count: Callable[[], float] | None = None
        self._weight = 0.0
        if callable(weight):
            self._count = weight
            return
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weight is {weight!r:.80}; give a number, or a function that returns one")
        self._weight = float(weight)
        check_weight(self._weight)

    def ask(self, worker_id: str) -> float:
        """The weight of a contribution that is made now. What the function raises goes through.

        Args:
            worker_id: named in errors.

        Raises:
            InvalidRequestError: WEIGHT_INVALID: what the function has counted is no number, or neither 0 nor from 1e-9
                to 1e9.
        """
        if self._count is not None:
            told = self._count()
            try:
                counted = self._weight + float(told)
                if counted != 0:
                    check_weight(counted)
            except (TypeError, ValueError):
                message = f"{worker_id}: the weight function returned {told!r:.80}, which is not a number"
                raise InvalidRequestError(message, Reason.WEIGHT_INVALID) from None
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{worker_id}: {error}", error.reason) from None
            self._weight = counted
        return self._weight

    def used(self, weight: float) -> None:
        """The round of a contribution with this weight is over."""
        if self._count is not None:
            self._weight -= weight
