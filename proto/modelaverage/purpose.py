"""What a push is for."""

from __future__ import annotations

import enum

__all__ = ["Purpose"]


class Purpose(enum.Enum):
    """The protocol's ``Purpose``, with its numbers."""

    CONTRIBUTE = 1
    """Its local variables are averaged."""
    ABSTAIN = 2
    """It counts at the barrier, not in the average, and has no fragments."""
    RESTORE = 3
    """It gives back the center of step ``base_step`` + 1, which replaces whatever else the round has."""
