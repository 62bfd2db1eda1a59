"""How many bytes of fragments a worker has sent to a server and received from it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinkBytes"]


@dataclass
class LinkBytes:
    """Counts of one connection, as the server counts them for its status: as the bytes were coded, without the headers
    of messages, and however they travelled. One thread sends and one receives at a time.

    Args:
        sent: to the server: initial values and pushes, also those that had to be repeated.
        received: from the server: pulls and averages.
    """

    sent: int = 0
    received: int = 0
