"""Every transport of the server, in the order in which a push is offered to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ps_server.machine.reserve import Reserve
from ps_server.transports.base import Transport
from ps_server.transports.data_port import DataPort
from ps_server.transports.messages import Messages
from ps_server.transports.shared_memory import SharedMemory

__all__ = ["Needs", "TRANSPORTS", "opened"]


@dataclass(frozen=True)
class Needs:
    """Resources that a transport may need.

    Args:
        max_workers: how many workers may take part in one round.
        reserve: descriptors for the server's own needs.
    """

    max_workers: int
    reserve: Reserve


TRANSPORTS: dict[str, Callable[[Needs], Transport]] = {
    "data connection": lambda needs: DataPort(needs.max_workers),
    "shared memory": lambda needs: SharedMemory(needs.max_workers, needs.reserve),
}
"""By name. A new transport takes one line here. Messages come last because they take every push."""


def opened(needs: Needs) -> dict[str, Transport]:
    """Creates all transports, by name."""
    return {name: make(needs) for name, make in TRANSPORTS.items()} | {"messages": Messages()}
