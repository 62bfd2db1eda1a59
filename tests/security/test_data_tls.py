"""The data port of a server with TLS: strangers are sent away, and both ends check each other as in calls."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from ma_client import SecurityError, Tls
from modelaverage.runtime.data_sockets import OVER_TLS
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports import data_port
from ps_server.transports.base import Opening
from tests.certificates import Identity
from tests.security.data_tls import (
    PLACE,
    TIMEOUT_S,
    client_context,
    connected,
    offer_of,
    open_port,
    play,
    raw_client,
)
from tests.security.guarded import Files


def in_tls_1_2(files: Files) -> ssl.SSLContext:
    context = client_context(files.authority.ca, files.client)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


STRANGERS: dict[str, Callable[[Files, bytes], tuple[ssl.SSLContext | None, bytes]]] = {
    "says nothing": lambda _, __: (None, b""),
    "sends garbage": lambda _, __: (None, bytes(range(256)) * 4),
    "sends half a greeting of TLS": lambda _, __: (None, b"\x16\x03\x01\x02\x00\x01\x00"),
    "knows the key and not TLS": lambda _, key: (None, key[:16]),
    "speaks HTTP": lambda _, __: (None, b"GET / HTTP/1.1\r\n\r\n"),
    "speaks TLS 1.2": lambda files, key: (in_tls_1_2(files), key[:16]),
    "has no certificate": lambda files, key: (client_context(files.authority.ca), key[:16]),
    "has another authority's certificate": lambda files, key: (
        client_context(files.authority.ca, files.stranger.sign("foreigner")),
        key[:16],
    ),
    "has an expired certificate": lambda files, key: (
        client_context(files.authority.ca, files.authority.sign("too late", expired=True)),
        key[:16],
    ),
    "does not know the key": lambda files, _: (client_context(files.authority.ca, files.client), bytes(16)),
    "knows the other half of the key": lambda files, key: (
        client_context(files.authority.ca, files.client),
        key[16:],
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_sent_away_without_an_answer_and_the_worker_still_gets_in(
    files: Files, stranger: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data_port, "_HANDSHAKE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(data_port, "_GREETINGS_AT_ONCE", 1)  # the worker gets in only after the stranger is gone
    caplog.set_level(logging.DEBUG, "ps_server")

    async def scenario() -> None:
        with open_port(files.server, files.authority.ca) as port:
            offer = offer_of(port)
            context, words = STRANGERS[stranger](files, offer.key)
            assert await asyncio.to_thread(raw_client, offer.port, context, words) == b""
            monkeypatch.setattr(data_port, "_HANDSHAKE_TIMEOUT_S", TIMEOUT_S)
            (await connected(port, files.tls(), offer)).close()
            port.take(PLACE).close()

    play(scenario)
    assert "a data connection from 127.0.0.1" in caplog.text
    assert "is refused" in caplog.text


def test_refused_strangers_do_not_fill_the_log(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ps_server")

    async def scenario() -> None:
        with open_port(files.server) as port:
            number = offer_of(port).port
            for _ in range(20):
                assert await asyncio.to_thread(raw_client, number, None, b"GET / HTTP/1.1\r\n\r\n") == b""

    play(scenario)
    assert 1 <= len([line for line in caplog.messages if "is refused" in line]) <= 10


def test_a_connection_that_nobody_was_offered_costs_no_handshake(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(_: ssl.SSLSocket) -> None:
        raise AssertionError("a handshake was made")

    monkeypatch.setattr(data_port, "handshake", made)

    async def scenario() -> None:
        with open_port(files.server) as port:
            offer = offer_of(port)
            port._drop(PLACE.worker_id)  # as when the process leaves
            context = client_context(files.authority.ca)
            assert await asyncio.to_thread(raw_client, offer.port, context, offer.key[:16]) == b""

    play(scenario)


def test_a_server_that_stops_ends_handshakes(files: Files) -> None:
    async def scenario() -> None:
        with open_port(files.server) as port, socket.socket() as silent, socket.socket() as halfway:
            number = offer_of(port).port
            for client in (silent, halfway):
                client.settimeout(TIMEOUT_S)
                client.connect(("127.0.0.1", number))
            halfway.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
            while len(port._arriving) < 2:
                await asyncio.sleep(0.01)
            port.close()
            for client in (silent, halfway):
                assert await asyncio.to_thread(client.recv, 1) == b""
            assert len(port._tasks) == 0 or await asyncio.wait(port._tasks, timeout=TIMEOUT_S)

    play(scenario)


def test_a_renewed_certificate_is_shown_to_the_next_connection_and_a_broken_one_is_not(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = Identity(tmp_path / "shown.pem", tmp_path / "shown.key")

    def use(signed: Identity) -> bytes:
        shown.cert.write_bytes(signed.cert.read_bytes())
        shown.key.write_bytes(signed.key.read_bytes())
        return ssl.PEM_cert_to_DER_cert(signed.cert.read_text())

    async def certificate(port: data_port.DataPort) -> bytes | None:
        connection = await connected(port, Tls(files.authority.ca))
        assert isinstance(connection._socket, ssl.SSLSocket)
        try:
            return connection._socket.getpeercert(binary_form=True)
        finally:
            connection.close()

    async def scenario() -> None:
        before = use(files.authority.sign("before"))
        with open_port(shown) as port:
            assert await certificate(port) == before
            after = use(files.authority.sign("after"))
            assert await certificate(port) == after
            shown.key.write_text("half a ke")
            assert await certificate(port) == after

    play(scenario)
    assert f"{shown.key} has no private key" in caplog.text


# What a worker checks.


def refusal_of(files: Files, server: Identity, tls: Tls, mutual: bool = False) -> str:
    """What a worker says that does not trust the port, or is not trusted there."""
    said = list[str]()

    async def scenario() -> None:
        with open_port(server, files.authority.ca if mutual else None) as port:
            with pytest.raises(SecurityError) as refused:
                await connected(port, tls)
            said.append(str(refused.value))

    play(scenario)
    return said[0]


def test_a_worker_trusts_only_a_server_of_its_authority_for_its_name_and_in_time(files: Files) -> None:
    tls = Tls(files.authority.ca)
    assert "no authority in" in refusal_of(files, files.stranger.sign("impostor"), tls)
    assert "has expired" in refusal_of(files, files.authority.sign("server of old", expired=True), tls)
    elsewhere = files.authority.sign("elsewhere", hosts=("ps.example",))
    said = refusal_of(files, elsewhere, tls)
    assert "not for '127.0.0.1'" in said
    assert "MA_TLS_SERVER_NAME" in said

    async def scenario() -> None:
        with open_port(elsewhere) as port:
            (await connected(port, Tls(files.authority.ca, server_name="ps.example"))).close()

    play(scenario)


def test_a_worker_whose_certificate_is_refused_says_what_to_give(files: Files) -> None:
    said = refusal_of(files, files.server, Tls(files.authority.ca), mutual=True)
    assert "wants a certificate from this client" in said
    assert "MA_TLS_CERT" in said
    foreigner = files.stranger.sign("foreign worker")
    said = refusal_of(files, files.server, Tls(files.authority.ca, foreigner.cert, foreigner.key), mutual=True)
    assert f"refuses the certificate in {foreigner.cert}" in said


@pytest.mark.parametrize("speaks", ["plain text", "TLS 1.2"])
def test_a_worker_with_tls_gives_its_key_to_no_port_without_tls_1_3(files: Files, speaks: str) -> None:
    offer_key, heard = b"k" * 32, list[bytes]()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            if speaks == "plain text":
                heard.append(connection.recv(4096))
                connection.sendall(offer_key[16:])
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.server.cert, files.server.key)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)
            heard.append(b"")

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, open_port(files.server) as port:
            serving = asyncio.create_task(asyncio.to_thread(serve, listener))
            offer = pb.DataConnection(port=listener.getsockname()[1], key=offer_key)
            with pytest.raises(OSError, match=r"(?i)ssl"):
                await connected(port, Tls(files.authority.ca), offer)
            await serving

    play(scenario)
    assert offer_key[:16] not in heard[0]


# Versions.


@pytest.mark.parametrize("has_tls", [True, False])
def test_a_connection_is_offered_only_to_a_client_that_knows_its_kind(files: Files, has_tls: bool) -> None:
    class OverTcp:
        peer = "ipv4:127.0.0.1:1"

    def offered(port: data_port.DataPort, **accepts: object) -> list[str]:
        header = pb.PushHeader(worker_id="a", incarnation=b"a process", **accepts)  # type: ignore[arg-type]
        admission = pb.PushAdmission()
        port.offer(Opening(header, OverTcp(), None, None), admission)  # type: ignore[arg-type]
        return ["plain"] * admission.HasField("data_connection") + [each.transport for each in admission.offers]

    async def scenario() -> None:
        with open_port(files.server) as port:
            if not has_tls:
                port._tls_context = None
            older = offered(port, accepts_data_connection=True)
            newer = offered(port, accepts_transports=["something else", OVER_TLS])
            assert (older, newer) == (([], [OVER_TLS]) if has_tls else (["plain"], []))

    play(scenario)
