"""The outer optimizer `average`: the average is the next center, as in TensorFlow 1.15. It costs nothing."""

from __future__ import annotations

from collections.abc import Mapping

from ps_server.center.outer.base import Setting, Slots, Values

__all__ = ["AVERAGE", "PlainAverage"]


class PlainAverage:
    """The plain average: no settings, no state."""

    @property
    def name(self) -> str:
        """``average``."""
        return "average"

    @property
    def settings(self) -> Mapping[str, Setting]:
        """None."""
        return {}

    @property
    def slots(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def has_master(self) -> bool:
        """False: it does not look at the center."""
        return False

    def init(self, center: Values) -> Slots:  # noqa: ARG002
        """Nothing."""
        return {}

    def update(self, center: Values, average: Values, state: Slots, step: int) -> tuple[Values, Slots]:  # noqa: ARG002
        """``average`` itself."""
        return average, state


AVERAGE = PlainAverage()
"""The default."""
