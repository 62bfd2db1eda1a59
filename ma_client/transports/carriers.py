"""Carriers of calls, by the server's address. A new carrier takes one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ma_client.transports.calls import Calls
from ma_client.transports.grpc_calls import GrpcCalls
from ma_client.transports.in_memory import SCHEME, MemoryCalls
from ma_client.transports.timing import Timing
from modelaverage.access.channels import Access

__all__ = ["CARRIERS", "calls_to"]

CARRIERS: dict[str, Callable[[str, Access, Timing], Calls]] = {
    SCHEME: lambda address, _, __: MemoryCalls(address),
}
"""By the host in an address; gRPC carries calls to all other hosts."""


def calls_to(address: str, access: Access, timing: Timing) -> Calls:
    """The carrier of calls to the server at an address."""
    return CARRIERS.get(address.partition(":")[0], GrpcCalls)(address, access, timing)
