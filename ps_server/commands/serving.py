"""What `ps-server serve` does: settings from flags, and the server's run."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
from functools import partial

from modelaverage.commands.serve_flags import ServeFlags
from modelaverage.logs import event, log_json, say
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.config import ServerConfig
from ps_server.edge.security import ServerSecurity
from ps_server.flow.service import DEFAULT_SHARED_MEMORY_FROM_BYTES, ServicePolicy
from ps_server.machine.descriptors import raise_limit
from ps_server.page.thread import PageConfig
from ps_server.rules.policy import MAX_WORKERS, RoundPolicy
from ps_server.server import serve, stop_on_signals
from ps_server.unusable import UnusableSettingError

__all__ = ["serve_as_told"]


def serve_as_told(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Raises UnusableSettingError, SecurityError."""
    if arguments.log_json:
        log_json("ps-server")
    else:
        logging.basicConfig(format="%(asctime)s ps-server: %(message)s")
    logging.getLogger("ps_server").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    raise_limit()
    config = ServerConfig(
        binds=tuple(arguments.bind or ["127.0.0.1:2222"]),
        policy=ServicePolicy(
            round=_round_policy(arguments),
            max_model_bytes=arguments.max_model_bytes,
            stall_timeout_s=arguments.stream_idle_timeout_s,
            shared_memory_from_bytes=math.inf if arguments.no_shared_memory else DEFAULT_SHARED_MEMORY_FROM_BYTES,
            checkpoints=None
            if arguments.checkpoint_dir is None
            else CheckpointPolicy(
                arguments.checkpoint_dir,
                arguments.checkpoint_every_rounds or 1,
                timeout_s=arguments.checkpoint_timeout_s,
            ),
        ),
        ready_file=arguments.ready_file,
        security=_server_security(arguments),
        metrics_bind=arguments.metrics_bind,
        page=_page_config(arguments),
        data_port=arguments.data_port,
    )

    tell = partial(say, "ps-server", arguments.log_json)

    async def run() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await serve(
            config,
            stop,
            ready=lambda at: tell(f"listening on {', '.join(at)}", event("listening", addresses=at)),
            metrics_ready=lambda at: tell(f"metrics at http://{at}/metrics", event("metrics_listening", address=at)),
            data_port_ready=lambda at: tell(
                f"data connections at {', '.join(at)}", event("data_port_listening", addresses=at)
            ),
            page_ready=lambda url: tell(f"page at {url}", event("page_listening", url=url)),
        )

    asyncio.run(run())
    return 0


def _page_config(arguments: argparse.Namespace) -> PageConfig | None:
    if arguments.page_shard_ca is not None and not arguments.page_shard:
        raise UnusableSettingError("--page-shard-ca needs --page-shard")
    if arguments.page_bind is None:
        for flag, value in (("--page-host", arguments.page_host), ("--page-shard", arguments.page_shard)):
            if value:
                raise UnusableSettingError(f"{flag} needs --page-bind")
        return None
    if arguments.page_shard_ca is not None and arguments.tls_cert is None:
        raise UnusableSettingError("--page-shard-ca needs --tls-cert: without it, other servers are asked without TLS")
    return PageConfig(
        arguments.page_bind,
        tuple(arguments.page_host),
        shards=tuple(arguments.page_shard),
        shard_ca=arguments.page_shard_ca,
    )


def _server_security(arguments: argparse.Namespace) -> ServerSecurity:
    return ServerSecurity(
        arguments.tls_cert,
        arguments.tls_key,
        arguments.tls_client_ca,
        arguments.token_file,
        arguments.chief_token_file,
        arguments.reader_token_file,
        arguments.insecure,
    )


def _round_policy(arguments: argparse.Namespace) -> RoundPolicy:
    """Raises UnusableSettingError unless the numbers of workers fit together."""
    num_workers: int = arguments.num_workers
    told = ServeFlags.from_arguments(arguments)
    try:
        told.check_workers(num_workers)
    except ValueError as error:
        raise UnusableSettingError(str(error)) from None
    max_workers = told.max_workers or num_workers
    if max_workers > MAX_WORKERS:
        flag = "--num-workers" if num_workers > MAX_WORKERS else "--max-workers"
        raise UnusableSettingError(f"{flag} {max_workers} is more than a round may have; at most {MAX_WORKERS} fit")
    grace_s = told.grace_s if isinstance(told.grace_s, float) else None
    return RoundPolicy(num_workers, told.min_workers or num_workers, max_workers, grace_s, told.round_timeout_s)
