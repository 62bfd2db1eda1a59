"""What a worker does when its local variables are not finite (NaN, infinite) at a round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelaverage.errors import InvalidRequestError
from modelaverage.logs import event
from modelaverage.names import listed

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
        state: returns the local optimizer's state, by parameter.
        named: returns the parameters' names.

    Raises:
        ValueError: there is no such policy.
    """

    def __init__(
        self,
        policy: str,
        state: Callable[[], Mapping[Any, dict[str, Any]]],
        named: Callable[[], Mapping[torch.Tensor, str]],
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"nonfinite is {policy!r:.80}; choose one of {', '.join(POLICIES)}")
        self._policy = policy
        self._state = state
        self._named = named
        self._was_said = False

    def lets_push(self, values: Mapping[str, NDArray[np.generic]], worker_id: str, local_step: int) -> bool:
        """Whether these local variables may be pushed; False: this worker abstains.

        Raises:
            InvalidRequestError: they are not finite, and the policy is ``raise``.
        """
        if self._policy == "allow":
            return True
        bad = _not_finite(values)
        if not bad:
            self._was_said = False
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

    def abstained(self, center: Mapping[str, NDArray[np.generic]], worker_id: str) -> None:
        """This worker abstained because of its values, and has installed this center. Drops the local optimizer's state
        of every parameter whose state is not finite either: torch makes it again at the next step.

        Raises:
            InvalidRequestError: the center is not finite, so every worker would abstain for ever.
        """
        bad = _not_finite(center)
        if bad:
            raise InvalidRequestError(
                f"{sum(bad.values())} values of {_listed(bad)} are not finite in the center itself, so all workers "
                "would abstain for ever; start the servers with an earlier checkpoint, or with new values"
            )
        state, names = self._state(), self._named()
        spoilt = [parameter for parameter, slots in state.items() if not all(map(_is_finite, slots.values()))]
        for parameter in spoilt:
            state[parameter].clear()
        if spoilt:
            shown = [names.get(parameter, "a parameter") for parameter in spoilt]
            _log.warning(
                "%s: the local optimizer's state of %s was not finite, and begins again",
                worker_id,
                _listed(shown),
                extra=event("optimizer_state_dropped", worker=worker_id, variables=shown[:10]),
            )


def _not_finite(values: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
    """How many values are not finite, by variable; only variables that have such."""
    found = dict[str, int]()
    for name, array in values.items():
        finite = np.isfinite(array)
        if not finite.all():
            found[name] = finite.size - int(np.count_nonzero(finite))
    return found


def _is_finite(slot: Any) -> bool:
    return not isinstance(slot, torch.Tensor) or bool(torch.isfinite(slot).all())


def _listed(names: Collection[str]) -> str:
    return listed(list(names)[:_NAMES_SHOWN], max(0, len(names) - _NAMES_SHOWN))
