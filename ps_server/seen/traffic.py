"""How many bytes of fragments the server has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Moved", "NO_TRAFFIC", "Traffic"]


class Moved(NamedTuple):
    """Bytes of fragments, on the way and as they would be if all were raw."""

    received_bytes: int = 0
    received_raw_bytes: int = 0
    sent_bytes: int = 0
    sent_raw_bytes: int = 0

    def plus(self, other: Moved) -> Moved:
        """The sum of both."""
        return Moved(
            self.received_bytes + other.received_bytes,
            self.received_raw_bytes + other.received_raw_bytes,
            self.sent_bytes + other.sent_bytes,
            self.sent_raw_bytes + other.sent_raw_bytes,
        )

    def since(self, before: Moved) -> Moved:
        """What has been moved since ``before``."""
        return Moved(
            self.received_bytes - before.received_bytes,
            self.received_raw_bytes - before.received_raw_bytes,
            self.sent_bytes - before.sent_bytes,
            self.sent_raw_bytes - before.sent_raw_bytes,
        )


NO_TRAFFIC = Moved()
"""Nothing."""


@dataclass
class Traffic:
    """Bytes of fragments moved by all calls, how many of them in shared memory and over data connections, and how many
    there would be if all fragments were raw."""

    received_bytes: int = 0
    sent_bytes: int = 0
    shared_bytes: int = 0
    aside_bytes: int = 0
    received_raw_bytes: int = 0
    sent_raw_bytes: int = 0

    def moved(self) -> Moved:
        """The present totals."""
        return Moved(self.received_bytes, self.received_raw_bytes, self.sent_bytes, self.sent_raw_bytes)
