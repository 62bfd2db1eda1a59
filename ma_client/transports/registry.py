"""Which transports for a push's bytes there are. A new one is a file, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ma_client.transports.base import ClientTransport
from ma_client.transports.calls import Calls
from ma_client.transports.data_connection import ClientDataTransport
from ma_client.transports.data_link import DataLink
from ma_client.transports.data_settings import DATA_SETTINGS, DataSettings
from ma_client.transports.shared_memory import ClientSharedMemory
from ma_client.transports.timing import TIMING, Timing

__all__ = ["TRANSPORTS", "TransportSettings", "transports_to"]


@dataclass(frozen=True)
class TransportSettings:
    """What a session says about the transports.

    Args:
        shared_memory: whether servers on this host may lend some.
        data: when to use data connections.
        timing: how long to wait for what.
    """

    shared_memory: bool = True
    data: DataSettings = DATA_SETTINGS
    timing: Timing = TIMING


TRANSPORTS: list[Callable[[Calls, TransportSettings], ClientTransport]] = [
    lambda _, settings: ClientSharedMemory(settings.shared_memory),
    lambda calls, settings: ClientDataTransport(
        DataLink(calls.address, calls.is_encrypted, settings.data), settings.timing
    ),
]
"""Makes each transport to a server, in the order in which a push tries them. Messages come last, and need no line."""


def transports_to(calls: Calls, settings: TransportSettings) -> list[ClientTransport]:
    """The transports for the pushes to one server."""
    return [make(calls, settings) for make in TRANSPORTS]
