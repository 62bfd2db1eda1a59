"""How a push ended. An outcome is a value, not an error: the client has received a center and continues from it."""

from __future__ import annotations

import enum

__all__ = ["Outcome"]


class Outcome(enum.Enum):
    """The protocol's ``Outcome``, with its numbers."""

    COMMITTED = 1
    """The round committed with this push."""
    STALE = 2
    """The base step was too low; the push was not used."""
    ALREADY_COUNTED = 3
    """An earlier push of this worker was counted: this very one, or one from before a restart."""
