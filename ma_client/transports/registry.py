"""The transports for a push's bytes. A new transport takes one file and one line here."""

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
    """The settings of a session for its transports.

    Args:
        shared_memory: whether servers on this host may lend shared memory.
        data: when to use data connections.
        timing: timeouts.
    """

    shared_memory: bool = True
    data: DataSettings = DATA_SETTINGS
    timing: Timing = TIMING


TRANSPORTS: list[Callable[[Calls, TransportSettings], ClientTransport]] = [
    lambda _, settings: ClientSharedMemory(settings.shared_memory),
    lambda calls, settings: ClientDataTransport(
        DataLink(calls.address, calls.encryption, settings.data), settings.timing
    ),
]
"""Creates the transports to a server, in the order in which a push tries them. Messages come last without a line."""


def transports_to(calls: Calls, settings: TransportSettings) -> list[ClientTransport]:
    """The transports for the pushes to one server."""
    return [make(calls, settings) for make in TRANSPORTS]
