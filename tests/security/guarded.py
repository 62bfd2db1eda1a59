"""A server with mutual TLS and tokens, credentials for it, and what a refused one must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ma_client import ParameterServerSession, Security, SecurityError, Tls
from modelaverage.access.channels import Access
from modelaverage.errors import Reason
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from tests.certificates import Authority, Identity
from tests.conftest import RunningServer
from tests.launched import Launched
from tests.raw_client import DEADLINE_S

CENTER = {"w": np.arange(100, dtype=np.float32)}
# The chief, workers and readers have different tokens.
TOKENS = {
    Role.CHIEF: "chief-0123456789abcdef",
    Role.WORKER: "worker-0123456789abcdef",
    Role.READER: "reader-0123456789ab",
}
SERVICE = "/modelaverage.v1.ParameterServer/"


@dataclass(frozen=True)
class Files:
    """An authority, another one that no server or client trusts, and tokens."""

    directory: Path
    authority: Authority
    stranger: Authority
    server: Identity
    client: Identity

    def token(self, role: Role) -> Path:
        return self.directory / role.name

    def tls(self, **changes: Any) -> Tls:
        return replace(Tls(self.authority.ca, self.client.cert, self.client.key), **changes)

    def security(self, role: Role | None = Role.WORKER, **tls: Any) -> Security:
        return Security(self.tls(**tls), token_file=None if role is None else self.token(role))

    @property
    def of_server(self) -> ServerSecurity:
        """Mutual TLS, and tokens of all three roles."""
        return ServerSecurity(
            self.server.cert,
            self.server.key,
            self.authority.ca,
            self.token(Role.WORKER),
            self.token(Role.CHIEF),
            self.token(Role.READER),
        )


class Guarded:
    """A server of one worker with mutual TLS, tokens, and a center."""

    def __init__(self, server: RunningServer, files: Files) -> None:
        self.address, self.files = server.address, files
        with session(self.address, files.security(Role.CHIEF), is_chief=True) as chief:
            chief.initialize(CENTER)
        self.before = self._state()

    def _state(self) -> tuple[bytes, pb.GetStatusResponse]:
        with session(self.address, self.files.security(Role.READER)) as reader:
            center, step = reader.pull()
            status = call_status(self.address, self.files.security(Role.READER))
        assert step == 0
        for worker in status.workers:
            worker.last_seen_age_s = 0
        status.uptime_s = 0
        status.ClearField("sent_bytes")  # of the pull above
        status.ClearField("sent_raw_bytes")
        return center["w"].tobytes(), status

    def refuses(self, security: Security, *words: str, reason: Reason | None = None) -> None:
        """A session with these credentials is refused, says why in one line with these words, and changes nothing."""
        with pytest.raises(SecurityError) as refused, session(self.address, security, is_chief=True) as intruder:
            intruder.initialize({"w": np.zeros(100, np.float32)})
        message = str(refused.value)
        assert refused.value.reason is reason
        assert "\n" not in message
        for word in words:
            assert word in message
        assert not any(token in message for token in TOKENS.values())
        self.is_unchanged()

    def is_unchanged(self) -> None:
        assert self._state() == self.before


def session(address: str, security: Security | None, is_chief: bool = False) -> ParameterServerSession:
    worker_id = "chief" if is_chief else "worker"
    return ParameterServerSession(
        [address],
        worker_id=worker_id,
        is_chief=is_chief,
        security=security,
        connect_timeout_s=10,
        reconnect_timeout_s=0,
    )


def call_status(address: str, security: Security) -> pb.GetStatusResponse:
    access = Access(security)
    with access.channel(address) as channel:
        call = channel.unary_unary(f"{SERVICE}GetStatus", None, pb.GetStatusResponse.FromString)
        return cast("pb.GetStatusResponse", call(b"", timeout=DEADLINE_S, metadata=access.metadata))


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """`ps-server serve` for two workers; gives its address."""
    with Launched(["-m", "ps_server", "serve", "--num-workers", "2", *flags]) as server:
        server.wait_for("listening on")
        yield server.lines[0].split()[-1]
        server.process.terminate()
        assert server.ended() == 0, server.printed()
        assert not any(token in server.printed() for token in TOKENS.values())


def flags_of(security: Security) -> list[str]:
    environ = security.to_env()
    names = {"--tls-ca": "MA_TLS_CA", "--tls-cert": "MA_TLS_CERT", "--tls-key": "MA_TLS_KEY"}
    names["--token-file"] = "MA_TOKEN_FILE"
    return [part for flag, name in names.items() if name in environ for part in (flag, environ[name])]
