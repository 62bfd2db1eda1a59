"""How many bytes of fragments the server has moved."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """Bytes of fragments moved by all calls, how many of them in shared memory, and how many there would be if all
    fragments were raw."""

    received_bytes: int = 0
    sent_bytes: int = 0
    shared_bytes: int = 0
    received_raw_bytes: int = 0
    sent_raw_bytes: int = 0
