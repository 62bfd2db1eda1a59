"""Beyond loopback something keeps strangers out, or the server says that nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ma_client import SecurityError
from ps_server.edge.security import ServerSecurity, check_exposure, warnings_of
from tests.launched import Launched

PLAIN = ServerSecurity()
TOKEN = ServerSecurity(token_file=Path("token"))
TLS = ServerSecurity(Path("cert"), Path("key"))
MUTUAL = replace(TLS, tls_client_ca=Path("ca"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_exposure(host, host, PLAIN)
    assert warnings_of(host, host, PLAIN) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "2001:db8::1"])
def test_beyond_loopback_something_keeps_strangers_out_or_a_warning_says_that_nothing_does(host: str) -> None:
    with pytest.raises(SecurityError, match="--insecure"):
        check_exposure(host, host, PLAIN)
    for security, warning in (
        (replace(PLAIN, insecure=True), "--insecure"),
        (TOKEN, "has no TLS"),
        (TLS, "neither --token-file nor --tls-client-ca"),
    ):
        check_exposure(host, host, security)
        (line,) = warnings_of(host, host, security)
        assert warning in line
    for security in (MUTUAL, replace(TLS, token_file=Path("token"))):
        check_exposure(host, host, security)
        assert warnings_of(host, host, security) == []


def test_a_server_that_strangers_can_reach_says_so() -> None:
    with Launched(["-m", "ps_server", "serve", "--num-workers", "1", "--bind", "0.0.0.0:0", "--insecure"]) as server:
        server.wait_for(
            "listening on", "0.0.0.0:0 is --insecure: anyone who can reach it can read and replace the model"
        )
