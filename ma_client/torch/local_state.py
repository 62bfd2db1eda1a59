"""The local optimizer's state of the parameters, as a worker that abstains looks at it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch

__all__ = ["LocalState", "ParameterState"]


class ParameterState(Protocol):
    """The state of a worker's parameters, by their names."""

    def spoilt(self) -> list[str]:
        """Names of the parameters whose state is not finite, in their order."""

    def drop(self, names: Collection[str]) -> None:
        """Drops the state of these parameters: torch makes it again at the next step."""


class LocalState:
    """The state in this process.

    Args:
        state: returns the local optimizer's state, by parameter.
        named: returns the parameters' names.
    """

    def __init__(
        self,
        state: Callable[[], Mapping[Any, dict[str, Any]]],
        named: Callable[[], Mapping[torch.Tensor, str]],
    ) -> None:
        self._state = state
        self._named = named

    def spoilt(self) -> list[str]:
        """See `ParameterState`."""
        return [name for name, slots in self._by_name().items() if not all(map(_is_finite, slots.values()))]

    def drop(self, names: Collection[str]) -> None:
        """See `ParameterState`."""
        for name, slots in self._by_name().items():
            if name in names:
                slots.clear()

    def _by_name(self) -> dict[str, dict[str, Any]]:
        named = self._named()
        return {named.get(parameter, "a parameter"): slots for parameter, slots in self._state().items()}


def _is_finite(slot: Any) -> bool:
    if not isinstance(slot, torch.Tensor):
        return True
    part = getattr(slot, "to_local", lambda: slot)()  # of a DTensor, what this rank has
    return bool(torch.isfinite(part).all())
