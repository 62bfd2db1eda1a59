"""What users may set of data connections."""

from __future__ import annotations

from dataclasses import dataclass

from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S

__all__ = ["DATA_SETTINGS", "DataSettings"]


@dataclass(frozen=True)
class DataSettings:
    """When a session uses data connections, and how long it waits for them.

    Args:
        least_bytes: a smaller model is one message, or a few, and travels so.
        connect_timeout_s: to connect, and to be answered; nobody waits for it. A slow link is full at that time.
        silence_timeout_s: a connection on which nothing moves for so long, though something should, is lost.
        pause_s: after one was lost, or was not to be had, pushes go in messages for so long: what stands between may
            let gRPC's port pass and no other, or small packets and no large ones.
    """

    least_bytes: int = 1 << 20
    connect_timeout_s: float = SILENCE_TIMEOUT_S
    silence_timeout_s: float = SILENCE_TIMEOUT_S
    pause_s: float = 60.0


DATA_SETTINGS = DataSettings()
"""The usual ones."""
