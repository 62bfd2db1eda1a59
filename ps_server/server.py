"""Assembly: one gRPC server around one service, from configuration to exit."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from modelaverage import wire
from modelaverage.addresses import Address, parse
from modelaverage.errors import SecurityError
from modelaverage.logs import event
from modelaverage.runtime.tuning import CHANNEL_OPTIONS, keep_freed_memory
from ps_server.beside import metrics_beside, page_beside
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.checkpoints.reading import CheckpointError, load_latest
from ps_server.config import ServerConfig
from ps_server.edge.credentials import ServerTls, tokens_of
from ps_server.edge.departures import hush_departures
from ps_server.edge.gatekeeper import Gatekeeper
from ps_server.edge.health import Health
from ps_server.edge.security import ServerSecurity, check_exposure, warnings_of
from ps_server.flow.service import ParameterServerService, ServicePolicy
from ps_server.machine.descriptors import DescriptorWatch, check_limit
from ps_server.machine.reserve import Reserve
from ps_server.page.connections import MAX_CONNECTIONS
from ps_server.rules.authorization import Tokens
from ps_server.transports.data_port import DataPort
from ps_server.unusable import UnusableSettingError

__all__ = ["ServerConfig", "UnusableSettingError", "serve", "stop_on_signals"]

_log = logging.getLogger("ps_server")

_OPTIONS = [
    # Otherwise a second server on the same port would start and take half of the calls.
    ("grpc.so_reuseport", 0),
    *CHANNEL_OPTIONS,
    # A worker has one call open, or two for a moment; a connection may not hold thousands.
    ("grpc.max_concurrent_streams", 100),
    # Clients send a keepalive ping every 5 s: do not treat it as an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    # Also without an open call, between two rounds: a client that vanished must not keep its descriptor forever.
    ("grpc.keepalive_permit_without_calls", 1),
    # A connection that stays silent is closed after this time, not after gRPC's two minutes. Over the slowest supported
    # links, with full queues, the first bytes take 16 s.
    ("grpc.server_handshake_timeout_ms", 30_000),
]


# The health service's name for the center, besides the service's own name.
_CENTER = "modelaverage.center"


async def serve(
    config: ServerConfig,
    stop: asyncio.Event,
    ready: Callable[[list[str]], None],
    metrics_ready: Callable[[str], None] = lambda _: None,
    data_port_ready: Callable[[list[str]], None] = lambda _: None,
    page_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until ``stop`` is set. Once it listens, calls ``ready`` with the real addresses, then ``data_port_ready``
    with those of data connections, if any, ``metrics_ready``, and ``page_ready`` with the URL of the page.

    Raises:
        UnusableSettingError: an address is malformed, not of this machine, or in use; the ready file cannot be written;
            the directory for checkpoints cannot be used; a certificate or token file cannot be used.
    """
    keep_freed_memory(one_arena=True)
    reserve = Reserve(_reserve_size())
    with _opened_home(config.policy.checkpoints) as home, closing(_service(config.policy, home, reserve)) as service:
        async with metrics_beside(config.metrics_bind, service) as metrics_at:

            def listening(addresses: list[str], data_addresses: list[str], page_url: str) -> None:
                ready(addresses)
                if data_addresses:
                    data_port_ready(data_addresses)
                if metrics_at:
                    metrics_ready(metrics_at)
                if page_url:
                    page_ready(page_url)

            _start_helper(service)
            watch = asyncio.ensure_future(DescriptorWatch(reserve).run())
            try:
                await _serve(config, service, stop, listening)
            finally:
                watch.cancel()


async def _serve(
    config: ServerConfig,
    service: ParameterServerService,
    stop: asyncio.Event,
    ready: Callable[[list[str], list[str], str], None],
) -> None:
    try:
        tls = ServerTls.of(config.security)
    except SecurityError as error:
        raise UnusableSettingError(str(error)) from None
    server, addresses, tokens = _assembled(config, service, tls)
    data_addresses = _open_data_port(config, service.data_port, tls)
    async with page_beside(config, service, tls, tokens, addresses) as page_url:

        def listening() -> None:
            _write_ready_file(config.ready_file, addresses, data_addresses)
            ready(addresses, data_addresses, page_url)

        await _serve_calls(config, service, server, bool(data_addresses), stop, listening)


async def _serve_calls(
    config: ServerConfig,
    service: ParameterServerService,
    server: grpc.aio.Server,
    has_data_port: bool,
    stop: asyncio.Event,
    listening: Callable[[], None],
) -> None:
    health = Health(serving=("",), not_yet=(_CENTER, wire.SERVICE))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await server.start()
    has_shared_memory = config.policy.shared_memory_from_bytes < math.inf
    others = 0 if config.page is None else MAX_CONNECTIONS
    check_limit(config.policy.round.max_workers, has_shared_memory, has_data_port, others)
    try:
        listening()
    except UnusableSettingError:
        await server.stop(grace=None)
        raise
    center = asyncio.ensure_future(service.wait_initialized())
    center.add_done_callback(lambda task: None if task.cancelled() else health.serve(_CENTER, wire.SERVICE))
    await stop.wait()
    _log.debug("stopping", extra=event("stopping"))
    center.cancel()
    health.stop()
    await service.stop(config.stop_timeout_s)
    await server.stop(grace=1.0)


def _assembled(
    config: ServerConfig, service: ParameterServerService, tls: ServerTls | None
) -> tuple[grpc.aio.Server, list[str], Callable[[], Tokens] | None]:
    """A gRPC server that listens on all addresses, with its security, once it is started; its addresses; the tokens
    that it knows."""
    try:
        tokens = tokens_of(config.security)
    except SecurityError as error:
        raise UnusableSettingError(str(error)) from None
    hush_departures()
    server = grpc.aio.server(options=_OPTIONS, interceptors=() if tokens is None else (Gatekeeper(tokens.get),))
    server.add_generic_rpc_handlers((service.handler(),))
    names = (wire.SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    addresses = [
        _listen(server, bind, None if tls is None else tls.credentials(), config.security) for bind in config.binds
    ]
    return server, addresses, None if tokens is None else tokens.get


def _start_helper(service: ParameterServerService) -> None:
    try:
        service.helper.start()
    except RuntimeError as error:
        raise UnusableSettingError(f"this machine has no thread for the server: {error}") from None


def _open_data_port(config: ServerConfig, data_port: DataPort, tls: ServerTls | None) -> list[str]:
    """The addresses for data connections: HOST:PORT each, all with the same port."""
    hosts = list(dict.fromkeys(where.host for where in map(_parsed, config.binds) if where.host))
    if config.data_port is None or not hosts:
        return []
    try:
        port = data_port.listen(hosts, config.data_port, None if tls is None else tls.context)
    except OSError as error:
        why = f"cannot listen on --data-port {config.data_port} of {', '.join(hosts)}: {error.strerror or error}"
        if config.data_port:
            raise UnusableSettingError(why) from None
        _log.warning("%s; fragments travel in messages", why, extra=event("no_data_port", cause=why))
        return []
    return [str(Address(host, port)) for host in hosts]


@contextmanager
def _opened_home(policy: CheckpointPolicy | None) -> Iterator[CheckpointHome | None]:
    """The directory for checkpoints, locked against other servers inside the context."""
    if policy is None:
        yield None
        return
    try:
        home = CheckpointHome(policy.directory)
    except BlockingIOError:
        raise UnusableSettingError(f"another server keeps its center in --checkpoint-dir {policy.directory}") from None
    except OSError as error:
        raise _unusable_home(policy, error) from None
    try:
        yield home
    finally:
        home.close()


def _service(policy: ServicePolicy, home: CheckpointHome | None, reserve: Reserve) -> ParameterServerService:
    """The service, restored from the newest checkpoint. No other reference to the checkpoint may remain: it is as large
    as the model."""
    if policy.checkpoints is None:
        return ParameterServerService(policy, reserve=reserve)
    try:
        restored = load_latest(policy.checkpoints.directory, policy.max_model_bytes)
        return ParameterServerService(policy, restored=restored, reserve=reserve, home=home)
    except (CheckpointError, OSError, RuntimeError) as error:
        raise _unusable_home(policy.checkpoints, error) from None


def _unusable_home(policy: CheckpointPolicy, error: Exception) -> UnusableSettingError:
    why = getattr(error, "strerror", None) or error
    return UnusableSettingError(f"cannot use --checkpoint-dir {policy.directory}: {why}")


def _reserve_size() -> int:
    """Descriptors for two more buffers and for memory lent to workers; fewer if the limit is low."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(4, min(16, limit // 16))


def stop_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM, SIGINT and SIGHUP set ``stop``; a second SIGTERM or SIGINT has its default effect. A SIGHUP that is
    already ignored (nohup) stays ignored."""
    loop = asyncio.get_running_loop()

    def request_stop(number: int) -> None:
        stop.set()
        if number == signal.SIGHUP:  # a closing terminal sends it twice: from the kernel and from the shell
            return
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)  # asyncio would restore the handler that prints a traceback

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, request_stop, number)


def _listen(
    server: grpc.aio.Server, bind: str, credentials: grpc.ServerCredentials | None, security: ServerSecurity
) -> str:
    """Listens on one address; returns the address that clients use."""
    where = _parsed(bind)
    if where.path:
        _remove_stale_socket(bind)
        _bind(server, bind, None)
        return bind
    _check_free(where.host, where.port, bind)
    try:
        check_exposure(where.host, bind, security)
    except SecurityError as error:
        raise UnusableSettingError(str(error)) from None
    for warning in warnings_of(where.host, bind, security):
        _log.warning("%s", warning, extra=event("exposed", address=bind, cause=warning))
    return str(replace(where, port=_bind(server, bind, credentials)))


def _parsed(bind: str) -> Address:
    try:
        return parse(bind, to_listen=True)
    except ValueError as error:
        raise UnusableSettingError(f"--bind {error} (or unix:PATH)") from None


def _bind(server: grpc.aio.Server, bind: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        return server.add_insecure_port(bind) if credentials is None else server.add_secure_port(bind, credentials)
    except RuntimeError as error:
        raise UnusableSettingError(f"cannot listen on {bind}: {error}") from None


def _check_free(host: str, port: int, bind: str) -> None:
    # gRPC does not say why it cannot bind; the socket API does.
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UnusableSettingError(
            f"cannot listen on {bind}: {why}; give another --bind (port 0 takes a free port)"
        ) from None


def _remove_stale_socket(bind: str) -> None:
    # A server that was killed leaves its socket behind; one that still listens must not lose it.
    path = Path(bind.removeprefix("unix:"))
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            if not path.absolute().parent.is_dir():
                raise UnusableSettingError(f"cannot listen on {bind}: its directory does not exist") from None
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise UnusableSettingError(f"cannot listen on {bind}: {error.strerror or error}") from None
        else:
            raise UnusableSettingError(f"cannot listen on {bind}: another server listens there")


def _write_ready_file(path: Path | None, addresses: list[str], data_addresses: list[str]) -> None:
    if path is None:
        return
    # Written under another name and renamed, so that a reader never sees half of the file.
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    content: dict[str, Any] = {"address": addresses[0], "addresses": addresses, "pid": os.getpid()}
    if data_addresses:
        content["data_port"] = int(data_addresses[0].rpartition(":")[2])
    try:
        beside.write_text(json.dumps(content) + "\n")
        beside.replace(path)
    except OSError as error:
        raise UnusableSettingError(f"cannot write --ready-file {path}: {error.strerror}") from None
