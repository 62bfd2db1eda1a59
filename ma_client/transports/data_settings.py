"""User settings for data connections."""

from __future__ import annotations

from dataclasses import dataclass

from modelaverage.checks import check_timeout
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S

__all__ = ["DATA_SETTINGS", "DataSettings"]


@dataclass(frozen=True)
class DataSettings:
    """When a session uses data connections, and how long it waits for them.

    Args:
        least_bytes: smaller models travel in messages, of which they need one or a few.
        connect_timeout_s: the time to connect and get an answer, in the background. The push may fill a slow link
            meanwhile.
        silence_timeout_s: a connection that should move bytes and moves none for this long is lost.
        pause_s: after a failure, pushes go in messages for this long. A firewall may let only gRPC's port through, or
            only small packets.

    Raises:
        InvalidRequestError: a time is out of range.
    """

    least_bytes: int = 1 << 20
    connect_timeout_s: float = SILENCE_TIMEOUT_S
    silence_timeout_s: float = SILENCE_TIMEOUT_S
    pause_s: float = 60.0

    def __post_init__(self) -> None:
        check_timeout("connect_timeout_s", self.connect_timeout_s)
        check_timeout("silence_timeout_s", self.silence_timeout_s)
        check_timeout("pause_s", self.pause_s, zero="no pause", may_be_infinite=True)


DATA_SETTINGS = DataSettings()
"""The default settings."""
