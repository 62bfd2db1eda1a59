"""Runs the page on a thread with a loop of its own, so that browsers take no time of the server's loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from modelaverage.access.channels import Access
from modelaverage.access.security import Security, Tls
from modelaverage.addresses import Address, parse
from modelaverage.errors import SecurityError
from modelaverage.logs import event
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.status import NoAnswerError, fetch
from ps_server.edge.security import ServerSecurity, check_exposure, page_warnings_of
from ps_server.page.feed import Feed, SampleSource
from ps_server.page.guard import Guard, HostNames, name_in
from ps_server.page.log_tail import LogTail
from ps_server.page.shards import OtherShards
from ps_server.rules.authorization import Tokens
from ps_server.seen.sample import PageSample

__all__ = ["PageConfig", "PageError", "serve_page"]

# The page's thread is given this long to end; it ends with the process in any case.
_STOP_TIMEOUT_S = 0.5
_START_TIMEOUT_S = 30.0
_SHARD_TIMEOUT_S = 2.0
_EVERYWHERE = ("0.0.0.0", "::")
_log = logging.getLogger("ps_server")


class PageError(Exception):
    """There can be no page at this address; the message says why, and what to do."""


@dataclass(frozen=True)
class PageConfig:
    """Settings of the page.

    Args:
        bind: where to listen, HOST:PORT (port 0: a free one).
        names: host names by which browsers may ask for it, besides that of ``bind`` and localhost.
        interval_s: the least time between two samples of the server.
        shards: addresses of the job's other servers, which the page shows, too. They are asked with this server's
            certificate and with the first token of its readers, or else of its workers.
        shard_ca: authorities that sign their certificates; None: the public ones.
    """

    bind: str
    names: tuple[str, ...] = ()
    interval_s: float = 1.0
    shards: tuple[str, ...] = ()
    shard_ca: Path | None = None


@asynccontextmanager
async def serve_page(
    config: PageConfig,
    security: ServerSecurity,
    tls_context: Callable[[], ssl.SSLContext] | None,
    tokens: Callable[[], Tokens] | None,
    sample: Callable[[], PageSample],
    address: str,
) -> AsyncIterator[str]:
    """Serves the page inside the context, which is entered on the server's loop. Yields the page's URL.

    Args:
        config: the page's settings.
        security: the server's.
        tls_context: returns the server's TLS context for the next connection; None: no TLS.
        tokens: the tokens that the server knows; None: it requires none.
        sample: takes a sample; called on this loop.
        address: where workers reach the server.

    Raises:
        PageError: nothing can listen there, or aiohttp is not installed.
    """
    if find_spec("aiohttp") is None:
        raise PageError("--page-bind needs aiohttp; run: pip install 'torch-model-average[page]'")
    where = _parsed(config.bind)
    _check_names(config.names)
    try:
        check_exposure(where.host, config.bind, security, "--page-bind")
    except SecurityError as error:
        raise PageError(str(error)) from None
    for warning in page_warnings_of(where.host, config.bind, security):
        _log.warning("%s", warning, extra=event("exposed", address=config.bind, cause=warning))
    log, others = LogTail(), _other_shards(config, security, address)
    source = SampleSource(sample, asyncio.get_running_loop(), address, time.time() - sample().now_s, log, others)
    with _listener(where, config.bind) as listener, log.attached(_log):
        port: int = listener.getsockname()[1]
        guard = Guard(HostNames(where.host, config.names), tokens)
        thread = _PageThread(listener, source, guard, config.interval_s, port, tls_context)
        await thread.start()
        try:
            yield f"http{'' if tls_context is None else 's'}://{_shown(where, port)}"
        finally:
            await thread.stop()


class _PageThread:
    """The thread.

    Args:
        listener: listens.
        source: of samples.
        guard: who may read.
        interval_s: the least time between two samples.
        port: of the listener; it names the cookie.
        tls_context: returns the TLS context for the next connection; None: no TLS.
    """

    def __init__(
        self,
        listener: socket.socket,
        source: SampleSource,
        guard: Guard,
        interval_s: float,
        port: int,
        tls_context: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._listener, self._source, self._guard = listener, source, guard
        self._interval_s, self._port, self._tls_context = interval_s, port, tls_context
        self._started: futures.Future[None] = futures.Future()
        self._ended: futures.Future[None] = futures.Future()
        self._stop: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Returns once it serves. Raises PageError."""
        try:
            Thread(target=self._run, name="page", daemon=True).start()
            await asyncio.wait_for(asyncio.wrap_future(self._started), _START_TIMEOUT_S)
        except (RuntimeError, ImportError, asyncio.TimeoutError) as error:
            raise PageError(f"the page cannot be served: {error or 'its thread does not start'}") from None

    async def stop(self) -> None:
        """Ends it. Returns after half a second at the latest, whatever its clients do."""
        with suppress(RuntimeError):  # it has ended already
            self._stop()
        await asyncio.wait((asyncio.wrap_future(self._ended),), timeout=_STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                _log.exception("the page has ended; the server goes on without it", extra=event("page_failed"))
        finally:
            self._ended.set_result(None)

    async def _serve(self) -> None:
        from aiohttp import web

        from ps_server.page.app import PageApp, PageProtocol
        from ps_server.page.connections import Connections

        quiet = logging.Logger("page", logging.CRITICAL + 1)  # hostile requests must not fill the log
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        connections = Connections(lambda: protocol(), self._tls_context)
        feed, cookie_name = Feed(self._source, self._interval_s), f"ma_page_{self._port}"
        page = PageApp(feed, self._guard, connections, cookie_name, is_encrypted=self._tls_context is not None)
        runner = web.AppRunner(
            page.application(), handle_signals=False, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        assert runner.server is not None
        protocol = partial(
            PageProtocol,
            runner.server,
            loop=loop,
            access_log=quiet,
            logger=quiet,
            keepalive_timeout=10.0,
            lingering_time=0.0,
            auto_decompress=False,
        )

        def stop() -> None:
            loop.call_soon_threadsafe(stopped.set)

        self._stop = stop
        accepting = asyncio.ensure_future(connections.accept(self._listener))
        self._started.set_result(None)
        await stopped.wait()
        accepting.cancel()
        await runner.cleanup()  # what is still open then ends with the loop


def _other_shards(config: PageConfig, security: ServerSecurity, address: str) -> OtherShards:
    """Those of the configuration, each once, without the server at ``address`` itself. Raises PageError."""
    addresses = [other for other in dict.fromkeys(config.shards) if other != address]
    if not addresses:
        return OtherShards((), lambda _: pb.GetStatusResponse())
    try:
        for other in addresses:
            parse(other)
        tls = None if security.tls_cert is None else Tls(config.shard_ca, security.tls_cert, security.tls_key)
        token_file = security.reader_token_file or security.token_file
        access = Access(Security(tls, token_file=token_file))
    except (ValueError, SecurityError) as error:
        raise PageError(f"--page-shard: {error}") from None
    return OtherShards(addresses, partial(_status_of, access=access))


def _status_of(address: str, access: Access) -> pb.GetStatusResponse:
    """Raises NoAnswerError."""
    try:
        return fetch(address, _SHARD_TIMEOUT_S, access)
    except NoAnswerError as error:
        # Advice for other clients, which take these settings from the environment.
        here = "" if "MA_T" not in str(error) else "; for the page: --tls-cert, --page-shard-ca and --token-file"
        raise NoAnswerError(f"{error}{here}") from None


def _shown(where: Address, port: int) -> Address:
    """An address to open in a browser."""
    return Address("localhost" if where.host in _EVERYWHERE else where.host, port)


def _parsed(bind: str) -> Address:
    try:
        where = parse(bind, to_listen=True)
        if where.path:
            raise ValueError(f"{bind!r} is not HOST:PORT, such as 127.0.0.1:8222: browsers need a port")
    except ValueError as error:
        raise PageError(f"--page-bind {error}") from None
    return where


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not name_in(name):
            raise PageError(
                f"--page-host {name!r} is not the name of a host; write it without scheme, port and path, such as "
                "trainer.lan"
            )


def _listener(where: Address, bind: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(
            address[:2], family=family, backlog=128, dualstack_ipv6=where.host == "::" and socket.has_dualstack_ipv6()
        )
    except (OSError, UnicodeError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise PageError(f"cannot serve the page on --page-bind {bind}: {why}; port 0 takes a free one") from None
    listener.setblocking(False)
    return listener
