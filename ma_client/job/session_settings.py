"""What the constructor of `ParameterServerSession` is told, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ma_client.transports.data_settings import DataSettings
from modelaverage.access.security import Security
from modelaverage.addresses import check_all
from modelaverage.checks import check_timeout, check_worker_id
from modelaverage.errors import InvalidRequestError
from modelaverage.manifest import MAX_SHARDS
from modelaverage.placement import PLACEMENTS

__all__ = ["SessionSettings"]


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """The settings of a `ParameterServerSession`; its docstring explains them.

    Raises:
        InvalidRequestError: WORKER_ID_INVALID, no address, one twice, no such placement, or a time out of range.
    """

    ps_hosts: Sequence[str]
    worker_id: str
    is_chief: bool
    connect_timeout_s: float
    fragment_size_bytes: int | None
    shared_memory: bool
    reconnect_timeout_s: float
    init_from: str | Path | None
    must_be_new: bool
    round_timeout_s: float | None
    placement: str
    security: Security | None
    data_connections: DataSettings

    def __post_init__(self) -> None:
        _check_ps_hosts(self.ps_hosts)
        check_worker_id(self.worker_id)
        check_timeout("connect_timeout_s", self.connect_timeout_s, may_be_infinite=True)
        check_timeout("reconnect_timeout_s", self.reconnect_timeout_s, zero="do not try again", may_be_infinite=True)
        check_timeout("round_timeout_s", self.round_timeout_s, none="no limit")
        if self.placement not in PLACEMENTS:
            raise InvalidRequestError(
                f"there is no placement {self.placement!r}; choose one of {', '.join(PLACEMENTS)}"
            )
        object.__setattr__(self, "ps_hosts", tuple(self.ps_hosts))


def _check_ps_hosts(ps_hosts: Sequence[str]) -> None:
    if isinstance(ps_hosts, str) or not ps_hosts:
        raise InvalidRequestError(f"ps_hosts is {ps_hosts!r}; give a list of the parameter servers' addresses")
    if len(ps_hosts) > MAX_SHARDS:
        raise InvalidRequestError(f"ps_hosts has {len(ps_hosts)} addresses; at most {MAX_SHARDS} are possible")
    try:
        check_all(ps_hosts)
    except ValueError as error:
        raise InvalidRequestError(f"ps_hosts: {error}") from None
    twice = [host for position, host in enumerate(ps_hosts) if host in ps_hosts[:position]]
    if twice:
        raise InvalidRequestError(f"ps_hosts has {twice[0]!r} twice; give every parameter server once")
