"""A renewed certificate or token counts without a restart; a broken one does not."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from ma_client import Outcome, Security, SecurityError
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from tests.certificates import Identity
from tests.conftest import StartServer
from tests.raw_client import DEADLINE_S
from tests.security.guarded import CENTER, TOKENS, Files, session


def shown_certificate(address: str) -> bytes:
    """The certificate that a server shows a new connection, before it asks for the client's."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as raw, context.wrap_socket(raw) as connection:
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def der(cert: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


def copied(identity: Identity, name: str) -> Identity:
    copy = Identity(identity.cert.with_name(f"{name}.pem"), identity.key.with_name(f"{name}.key"))
    exchange(copy, identity)
    return copy


def exchange(old: Identity, new: Identity) -> None:
    for path, source in ((old.cert, new.cert), (old.key, new.key)):
        beside = path.with_suffix(".new")
        beside.write_bytes(source.read_bytes())
        beside.replace(path)


def test_a_renewed_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(
    start_server: StartServer, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = files.authority.sign("before", expired=True), files.authority.sign("renewed")
    shown = copied(old, "shown")
    server = ServerSecurity(shown.cert, shown.key, token_file=files.token(Role.WORKER))
    address = start_server(1, security=server).address
    assert shown_certificate(address) == der(old.cert)
    exchange(shown, new)
    with session(address, files.security(Role.WORKER), is_chief=True) as chief:
        chief.initialize(CENTER)
        assert shown_certificate(address) == der(new.cert)
        shown.key.write_bytes(old.key.read_bytes())
        assert shown_certificate(address) == der(new.cert)
        assert f"the key in {shown.key} does not belong to the certificate in {shown.cert}" in caplog.text
        shown.cert.write_text("nonsense")
        assert shown_certificate(address) == der(new.cert)
        assert f"{shown.cert} has no certificate" in caplog.text
        assert chief.push_and_average(CENTER).outcome is Outcome.COMMITTED
    with session(address, files.security(Role.WORKER)) as worker:
        assert worker.pull()[1] == 1


def test_a_changed_token_file_counts_at_once_on_both_sides_and_an_empty_one_does_not(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_server, of_worker = tmp_path / "server", tmp_path / "worker"
    first, second = TOKENS[Role.WORKER], TOKENS[Role.CHIEF]
    for path in (of_server, of_worker):
        path.write_text(first)
    address = start_server(1, security=ServerSecurity(token_file=of_server)).address
    with session(address, Security(token_file=of_worker), is_chief=True) as worker:
        worker.initialize(CENTER)
        of_server.write_text(f"# both, until all workers have the new one\n{second}\n{first}\n")
        worker.pull()
        of_worker.write_text(second)
        worker.pull()
        of_server.write_text(f"{second}\n")
        worker.pull()
        with pytest.raises(SecurityError, match="does not know the token"):
            session(address, Security(token=first))
        of_server.write_text("\n")
        worker.pull()
        assert f"{of_server} has no token" in caplog.text
        of_worker.unlink()
        worker.pull()
        assert f"cannot read {of_worker}" in caplog.text
    assert not any(token in caplog.text for token in TOKENS.values())
