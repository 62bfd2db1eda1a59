"""The purpose of a push."""

from __future__ import annotations

import enum

__all__ = ["Purpose"]


class Purpose(enum.Enum):
    """The protocol's ``Purpose``, with its numbers."""

    CONTRIBUTE = 1
    """The local variables are averaged."""
    ABSTAIN = 2
    """The push counts at the barrier, not in the average, and has no fragments."""
    RESTORE = 3
    """The push restores the center of step ``base_step`` + 1, which replaces all other pushes of the round."""
