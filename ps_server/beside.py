"""What a server serves besides its calls: metrics and the page, each on a thread of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from modelaverage.addresses import parse
from ps_server.config import ServerConfig
from ps_server.edge.credentials import ServerTls
from ps_server.edge.metrics import MetricsError, serve_metrics
from ps_server.flow.service import ParameterServerService
from ps_server.page.thread import PageError, serve_page
from ps_server.rules.authorization import Tokens
from ps_server.unusable import UnusableSettingError

__all__ = ["metrics_beside", "page_beside"]


@asynccontextmanager
async def metrics_beside(bind: str | None, service: ParameterServerService) -> AsyncIterator[str]:
    """Serves metrics inside the context. Yields their real address; empty if there is none."""
    if bind is None:
        yield ""
        return
    try:
        where = parse(bind, to_listen=True)
        if where.path:
            raise ValueError(
                f"{bind!r} is not HOST:PORT, such as 127.0.0.1:9464: metrics cannot be served on a Unix socket"
            )
    except ValueError as error:
        raise UnusableSettingError(f"--metrics-bind {error}") from None
    try:
        port, end = serve_metrics(where.host, where.port, service.metrics_sample)
    except MetricsError as error:
        raise UnusableSettingError(f"cannot serve metrics on --metrics-bind {bind}: {error}") from None
    try:
        yield str(replace(where, port=port))
    finally:
        end()


@asynccontextmanager
async def page_beside(
    config: ServerConfig,
    service: ParameterServerService,
    tls: ServerTls | None,
    tokens: Callable[[], Tokens] | None,
    addresses: list[str],
) -> AsyncIterator[str]:
    """Serves the page inside the context. Yields its URL; empty if there is none."""
    if config.page is None:
        yield ""
        return
    tls_context = None if tls is None else tls.context
    page = serve_page(config.page, config.security, tls_context, tokens, service.page_sample, addresses[0])
    async with AsyncExitStack() as stack:
        try:
            url = await stack.enter_async_context(page)
        except PageError as error:
            raise UnusableSettingError(str(error)) from None
        yield url
