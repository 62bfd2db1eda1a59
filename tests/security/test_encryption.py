"""With TLS no tensor is in plain text, and an error of a handshake is told from other trouble."""

from __future__ import annotations

import numpy as np
import pytest

from ma_client import Security, Tls
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.channels import Access
from modelaverage.access.handshake import problem
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from ps_server.transports.data_port import DataPort
from tests.conftest import StartServer
from tests.pairs import Pair
from tests.security.guarded import Files, Guarded, session
from tests.tls_proxy import TlsProxy
from tests.wiretap import Wiretap


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_tensors_are_in_plain_text_on_the_wire_without_tls_and_not_with_it(
    start_server: StartServer, files: Files, is_encrypted: bool
) -> None:
    security, of_server = (
        (files.security(Role.CHIEF), files.of_server) if is_encrypted else (Security(), ServerSecurity())
    )
    weights = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32)
    pushed = weights + 1
    with Wiretap(start_server(1, security=of_server).address) as tap:
        with session(tap.address, security, is_chief=True) as chief:
            chief.initialize({"w": weights})
            center, _ = chief.pull()
            result = chief.push_and_average({"w": pushed})
        assert (center["w"] == weights).all()
        assert (result.center["w"] == pushed).all()
        up, down = tap.recorded
    size_bytes = weights.nbytes + pushed.nbytes
    assert len(up) > size_bytes
    assert len(down) > size_bytes
    for values in (weights, pushed):
        for recorded in (up, down):
            part_found = share_found(values.tobytes(), recorded)
            assert part_found == 0 if is_encrypted else part_found > 0.9


def share_found(values: bytes, recorded: bytes) -> float:
    """The share of the 32-byte pieces of ``values`` that occur; headers of frames cut a few of them in two."""
    pieces = [values[start : start + 32] for start in range(0, len(values), 32)]
    return sum(piece in recorded for piece in pieces) / len(pieces)


@pytest.mark.parametrize("is_mutual", [False, True])
def test_behind_a_proxy_that_ends_tls_nothing_goes_beside_the_calls(
    start_server: StartServer, files: Files, monkeypatch: pytest.MonkeyPatch, is_mutual: bool
) -> None:
    beside = list[str]()
    monkeypatch.setattr(DataPort, "offer_to", lambda _, place: beside.append(f"asked for by {place.worker_id}"))
    monkeypatch.setattr(DataSocket, "open", lambda *_: beside.append("opened"))
    client = files.tls() if is_mutual else Tls(files.authority.ca)
    # A server that would offer a data connection, since it has no TLS itself.
    target = start_server(2, security=ServerSecurity(token_file=files.token(Role.WORKER))).address
    with TlsProxy(target, files.server, str(files.authority.ca) if is_mutual else None) as proxy:
        security = Security(client, token_file=files.token(Role.WORKER))
        with Pair(proxy.address, security=security) as pair:
            for _ in range(4):
                pair.round()
            assert pair.transports == {pb.TRANSPORT_TCP}
    assert beside == []


@pytest.mark.parametrize(
    ("tls", "address", "is_encrypted"),
    [
        (None, "ps:2222", False),
        (Tls(), "ps:2222", True),
        (Tls(), "dns:///ps:2222", True),
        (Tls(), "unix-abstract:ps", True),
        (Tls(), "unix:/run/ps.sock", False),
        (Tls(), "unix:///run/ps.sock", False),
        (None, "unix:/run/ps.sock", False),
    ],
)
def test_channels_are_encrypted_with_tls_but_for_unix_sockets(
    tls: Tls | None, address: str, is_encrypted: bool
) -> None:
    assert Access(Security(tls)).is_encrypted(address) == is_encrypted


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "a..b:1", "unix:/nowhere", "nonsense", ":1"])
@pytest.mark.parametrize("tls", [None, Tls()])
def test_where_nothing_answers_no_certificate_is_blamed(address: str, tls: Tls | None) -> None:
    assert problem(address, tls) is None


def test_a_server_that_works_has_no_problem(guarded: Guarded, start_server: StartServer) -> None:
    assert problem(guarded.address, guarded.files.tls()) is None
    assert problem(start_server(1).address, None) is None
