"""The settings of a server, as `ps-server serve` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ps_server.edge.security import NO_SECURITY, ServerSecurity
from ps_server.flow.service import ServicePolicy
from ps_server.page.thread import PageConfig

__all__ = ["ServerConfig"]


@dataclass(frozen=True)
class ServerConfig:
    """All settings of `ps-server serve`.

    Args:
        binds: addresses to listen on, each HOST:PORT (port 0: a free one) or unix:PATH.
        policy: the settings of the service.
        ready_file: where to write ``{"address": ..., "addresses": [...], "pid": ..., "data_port": ...}`` once it
            listens; without ``data_port`` if it offers no data connections; None: nowhere.
        stop_timeout_s: how long active calls may take to finish after SIGTERM.
        security: which clients may connect, and how connections are protected.
        metrics_bind: where to serve metrics for Prometheus, HOST:PORT (port 0: a free one); None: nowhere.
        page: of the page that shows the run; None: there is no page.
        data_port: the port for data connections on every host of ``binds``; 0: a free one, None: no data connections.
            With TLS they are encrypted like the calls.
    """

    binds: tuple[str, ...]
    policy: ServicePolicy
    ready_file: Path | None = None
    stop_timeout_s: float = 5.0
    security: ServerSecurity = NO_SECURITY
    metrics_bind: str | None = None
    page: PageConfig | None = None
    data_port: int | None = 0
