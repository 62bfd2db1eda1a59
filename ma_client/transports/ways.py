"""Which ways for a push's bytes there are. A new one is a file, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ma_client.transports.calls import Calls
from ma_client.transports.data_connection import DataWay
from ma_client.transports.data_link import DataLink
from ma_client.transports.data_settings import DATA_SETTINGS, DataSettings
from ma_client.transports.shared_memory import SharedMemoryWay
from ma_client.transports.timing import TIMING, Timing
from ma_client.transports.way import Way

__all__ = ["WAYS", "WaySettings", "ways_to"]


@dataclass(frozen=True)
class WaySettings:
    """What a session says about the ways.

    Args:
        shared_memory: whether servers on this host may lend some.
        data: when to use data connections.
        timing: how long to wait for what.
    """

    shared_memory: bool = True
    data: DataSettings = DATA_SETTINGS
    timing: Timing = TIMING


WAYS: list[Callable[[Calls, WaySettings], Way]] = [
    lambda _, settings: SharedMemoryWay(settings.shared_memory),
    lambda calls, settings: DataWay(DataLink(calls.address, calls.is_encrypted, settings.data), settings.timing),
]
"""Makes each way to a server, in the order in which a push tries them. Messages come last, and need no line."""


def ways_to(calls: Calls, settings: WaySettings) -> list[Way]:
    """The ways for the pushes to one server."""
    return [make(calls, settings) for make in WAYS]
