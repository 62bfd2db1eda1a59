"""How many bytes of fragments the server has moved."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """Bytes of fragments moved by all calls, and how many of them in shared memory."""

    received_bytes: int = 0
    sent_bytes: int = 0
    shared_bytes: int = 0
