"""Proxies: a client uses one only on request; if one is in the way, the error names its variable."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.access.channels import Access
from modelaverage.access.proxies import in_the_way, is_wanted
from modelaverage.access.security import Security
from modelaverage.errors import ServerUnavailableError
from ps_server.console import status
from ps_server.console.export import ExportError, export
from tests.conftest import StartServer

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.fixture(params=VARIABLES)
def variable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sets this variable to the address of a proxy that does not exist; the other variables are unset."""
    for name in (*VARIABLES, "no_proxy", "no_grpc_proxy", "MA_USE_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as nobody:  # bound, and does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv(request.param, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        yield request.param


@pytest.mark.usefixtures("variable")
def test_no_channel_uses_a_proxy_that_nobody_asked_for(start_server: StartServer, tmp_path: object) -> None:
    address = start_server(1).address
    with ParameterServerSession([address], worker_id="a", is_chief=True, connect_timeout_s=20) as session:
        session.initialize({"w": np.ones(3, np.float32)})
    access = Access(Security())
    assert status.fetch(address, 20, access).model_size_bytes == 12
    assert export([address], tmp_path / "out.safetensors", 20, access) == 0  # type: ignore[operator]


def test_a_proxy_that_was_asked_for_and_is_in_the_way_is_named(
    variable: str, start_server: StartServer, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("MA_USE_PROXY", "1")
    address, access = start_server(1).address, Access(Security())
    with pytest.raises(ServerUnavailableError, match=f"MA_USE_PROXY is set.*{variable}=http"):
        ParameterServerSession([address], worker_id="a", connect_timeout_s=0.6)
    with pytest.raises(status.NoAnswerError, match=f"MA_USE_PROXY is set.*{variable}=http"):
        status.fetch(address, 0.3, access)
    with pytest.raises(ExportError, match=f"MA_USE_PROXY is set.*{variable}=http"):
        export([address], tmp_path / "out.safetensors", 0.3, access)  # type: ignore[operator]


@pytest.mark.parametrize("value", ["", "0", "no", "false"])
def test_what_says_no_does_not_ask_for_a_proxy(value: str) -> None:
    environ = {"MA_USE_PROXY": value, "https_proxy": "http://proxy:3128"}
    assert not is_wanted(environ)
    assert in_the_way("ps:2222", environ) == ""
    assert in_the_way("ps:2222", {**environ, "MA_USE_PROXY": "1"})
    assert in_the_way("unix:/tmp/ps.sock", {**environ, "MA_USE_PROXY": "1"}) == ""
