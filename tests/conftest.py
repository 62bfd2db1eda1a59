"""For tests of the shell: a real server on a free port, in this process, on its own thread."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import pytest

from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.edge.security import NO_SECURITY, ServerSecurity
from ps_server.flow.service import ServicePolicy
from ps_server.page.thread import PageConfig
from ps_server.rules.policy import RoundPolicy
from ps_server.server import ServerConfig, serve
from tests.in_memory import ServerInMemory
from tests.jobs import Job, running


def pytest_collection_finish() -> None:
    """What the tests have imported stays, millions of objects: no later search for garbage looks through it."""
    freeze_garbage()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Logs may contain file names that are not valid text; a report crosses a process boundary as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that a test runs in this process set up logging; other tests must not see that."""
    loggers = [logging.getLogger(name) for name in (None, "ps_server", "ma_client")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def freeze_garbage() -> None:
    """Has later searches for garbage look only at objects that are made from now on."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class RunningServer(Protocol):
    """A parameter server.

    Attributes:
        address: the address for sessions.
        metrics_address: where its metrics are served; empty if they are not.
        page_url: of its page; empty if there is none.
        loop: the event loop that it runs on.
    """

    address: str
    metrics_address: str
    page_url: str
    loop: asyncio.AbstractEventLoop

    def stop(self) -> None:
        """Stops it as SIGTERM would, and raises what it raised."""


class _GrpcServer:
    """A server on a free port of loopback."""

    def __init__(
        self, policy: ServicePolicy, security: ServerSecurity, metrics_bind: str | None, page: PageConfig | None
    ) -> None:
        self.address = self.metrics_address = self.page_url = ""
        self._config = ServerConfig(
            ("127.0.0.1:0",), policy, stop_timeout_s=2.0, security=security, metrics_bind=metrics_bind, page=page
        )
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(timeout=20)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def ready(addresses: list[str]) -> None:
            self.address = addresses[0]
            told()

        def metrics_ready(address: str) -> None:
            self.metrics_address = address
            told()

        def page_ready(url: str) -> None:
            self.page_url = url
            told()

        def told() -> None:
            has_metrics = self._config.metrics_bind is None or self.metrics_address
            if self.address and has_metrics and (self._config.page is None or self.page_url):
                self._ready.set()

        await serve(self._config, self._stop, ready, metrics_ready, page_ready=page_ready)

    def stop(self) -> None:
        """Stops it as SIGTERM would, and raises what it raised."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), "the server did not stop"
        if self._failure is not None:
            raise self._failure


StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server(request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """start_server(num_workers or a RoundPolicy, ...) -> a running server; it is stopped at the end.

    In tests that are marked with `in_memory`, and not with `in_memory(False)`, sessions reach it without gRPC.

    ``shared``: whether it offers shared memory, however small the model.
    """
    servers: list[RunningServer] = []
    mark = request.node.get_closest_marker("in_memory")
    is_in_memory = mark is not None and mark.args != (False,)

    def start(
        policy: int | RoundPolicy,
        max_model_bytes: int = 1 << 30,
        stall_timeout_s: float = 30.0,
        shared: bool = False,
        checkpoints: CheckpointPolicy | None = None,
        rejoin_timeout_s: float = 0.5,
        security: ServerSecurity = NO_SECURITY,
        metrics_bind: str | None = None,
        page: PageConfig | None = None,
        first_notice_s: float = 5.0,
    ) -> RunningServer:
        round_policy = RoundPolicy.strict(policy) if isinstance(policy, int) else policy
        shared_memory_from_bytes = 0 if shared else math.inf
        service_policy = ServicePolicy(
            round_policy,
            max_model_bytes,
            stall_timeout_s,
            shared_memory_from_bytes,
            checkpoints,
            rejoin_timeout_s,
            first_notice_s,
        )
        needs_more = checkpoints is not None or security is not NO_SECURITY or metrics_bind is not None
        needs_more = needs_more or page is not None
        if is_in_memory and not needs_more:
            servers.append(ServerInMemory(service_policy))
        else:
            servers.append(_GrpcServer(service_policy, security, metrics_bind, page))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def job(start_server: StartServer) -> Iterator[Job]:
    with running(start_server) as job:
        yield job
