"""What a worker does when its local variables are not finite (NaN, infinite) at a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from ma_client.torch.local_state import ParameterState
from modelaverage.errors import InvalidRequestError
from modelaverage.logs import event
from modelaverage.names import listed
from modelaverage.outer.base import summed_in

__all__ = ["NonfiniteGuard", "POLICIES"]

_log = logging.getLogger("ma_client")
_NAMES_SHOWN = 3

POLICIES = ("allow", "abstain", "raise")
"""``allow``: such values are pushed, and the center becomes as bad; both logs warn. ``abstain``: the worker's push does
not count, and the worker goes on from the center. ``raise``: nothing is pushed, and the round fails."""


class NonfiniteGuard:
    """Applies a policy to one worker's contributions.

    Args:
        policy: one of `POLICIES`.
        state: the local optimizer's.

    Raises:
        ValueError: there is no such policy.
    """

    def __init__(self, policy: str, state: ParameterState) -> None:
        if policy not in POLICIES:
            raise ValueError(f"nonfinite is {policy!r:.80}; choose one of {', '.join(POLICIES)}")
        self._policy = policy
        self._state = state
        self._was_said = self._drop_was_said = False

    def lets_push(
        self, values: Mapping[str, NDArray[np.generic]], untouched: Collection[str], worker_id: str, local_step: int
    ) -> bool:
        """Whether these local variables may be pushed; False: this worker abstains. Those in ``untouched`` are as they
        came from the center and are not looked at: a buffer may be infinite on purpose, as a mask is.

        Raises:
            InvalidRequestError: they are not finite, and the policy is ``raise``.
        """
        if self._policy == "allow":
            return True
        bad = _counts({name: array for name, array in values.items() if name not in untouched}, np.isfinite)
        if not bad:
            self._was_said = self._drop_was_said = False
            return True
        found = (
            f"{sum(bad.values())} values of {_listed(bad)} are not finite (NaN, infinite) at local step {local_step}"
        )
        if self._policy == "raise":
            raise InvalidRequestError(f"{worker_id}: {found}; nothing was pushed (nonfinite='raise')")
        if not self._was_said:
            _log.warning(
                "%s; %s abstains from the average and goes on from the center",
                found,
                worker_id,
                extra=event("worker_abstains", worker=worker_id, values=sum(bad.values()), variables=list(bad)[:10]),
            )
        self._was_said = True
        return False

    def abstained(self, center: Mapping[str, NDArray[np.generic]], untouched: Collection[str], worker_id: str) -> None:
        """This worker abstained because of its values, and has installed this center. Drops the local optimizer's state
        of every parameter whose state is not finite either: torch makes it again at the next step.

        Variables in ``untouched``, as in `lets_push`, may be infinite, but not NaN.

        Raises:
            InvalidRequestError: the center is not finite, so every worker would abstain for ever.
        """
        bad = _counts({name: array for name, array in center.items() if name not in untouched}, np.isfinite)
        bad |= _counts({name: center[name] for name in untouched if name in center}, _is_number)
        if bad:
            raise InvalidRequestError(
                f"{sum(bad.values())} values of {_listed(bad)} are not finite in the center itself, so all workers "
                "would abstain for ever; start the servers with an earlier checkpoint, or with new values"
            )
        spoilt = self._state.spoilt()
        if spoilt:
            self._state.drop(spoilt)
        if spoilt and not self._drop_was_said:
            self._drop_was_said = True
            _log.warning(
                "%s: the local optimizer's state of %s was not finite, and begins again",
                worker_id,
                _listed(spoilt),
                extra=event("optimizer_state_dropped", worker=worker_id, variables=spoilt[:10]),
            )


def _counts(
    values: Mapping[str, NDArray[np.generic]], is_right: Callable[[NDArray[np.generic]], NDArray[np.bool_]]
) -> dict[str, int]:
    """How many values are not right, by variable; only variables that have such. ``is_right`` holds for finite ones."""
    found = dict[str, int]()
    for name, array in values.items():
        with np.errstate(all="ignore"):  # a sum of finite values may overflow; then they are looked at one by one
            total = np.add.reduce(array, axis=None, dtype=summed_in(array.dtype))
        if math.isfinite(total):  # as a sum with NaN or infinity is not
            continue
        wrong = array.size - int(np.count_nonzero(is_right(array)))
        if wrong:
            found[name] = wrong
    return found


def _is_number(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    are_numbers: NDArray[np.bool_] = np.logical_not(np.isnan(array))
    return are_numbers


def _listed(names: Collection[str]) -> str:
    return listed(list(names)[:_NAMES_SHOWN], max(0, len(names) - _NAMES_SHOWN))
