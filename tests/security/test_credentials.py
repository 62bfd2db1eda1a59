"""The right credentials are let in; a wrong token or certificate is refused and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ma_client import Outcome, Security, SecurityError
from modelaverage.errors import Reason
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from tests.conftest import StartServer
from tests.security.guarded import CENTER, TOKENS, Files, Guarded, call_status, serving, session

# What is right.


def test_with_the_right_credentials_a_round_commits(guarded: Guarded) -> None:
    with session(guarded.address, guarded.files.security(Role.WORKER)) as worker:
        worker.pull()
        result = worker.push_and_average({"w": CENTER["w"] + 1})
    assert result.outcome is Outcome.COMMITTED
    assert (result.center["w"] == CENTER["w"] + 1).all()


def test_the_only_token_of_a_server_may_do_everything(start_server: StartServer, files: Files) -> None:
    address = start_server(1, security=ServerSecurity(token_file=files.token(Role.WORKER))).address
    with session(address, Security(token=TOKENS[Role.WORKER]), is_chief=True) as chief:
        chief.initialize(CENTER)
        assert chief.push_and_average(CENTER).outcome is Outcome.COMMITTED


def test_a_session_takes_what_the_environment_says(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, files: Files
) -> None:
    for name, value in files.security(Role.READER).to_env().items():
        monkeypatch.setenv(name, value)
    with session(guarded.address, None) as reader:
        assert (reader.pull()[0]["w"] == CENTER["w"]).all()


def test_what_the_environment_says_is_what_was_meant(files: Files) -> None:
    meant = files.security(Role.WORKER, server_name="ps")
    found = Security.from_env(meant.to_env())
    assert found.to_env() == meant.to_env()
    assert found.tls is not None
    assert found.tls.server_name == "ps"
    assert Security.from_env({"MA_TLS_CA": "", "MA_TOKEN_FILE": ""}) == Security()


def test_a_unix_socket_has_no_tls_and_wants_the_token(files: Files, tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/socket"
    flags = ["--tls-cert", str(files.server.cert), "--tls-key", str(files.server.key)]
    with serving("--bind", bind, *flags, "--token-file", str(files.token(Role.WORKER))):
        assert call_status(bind, files.security(Role.WORKER)).phase == pb.PHASE_UNINITIALIZED
        with pytest.raises(SecurityError, match="no token"), session(bind, Security()):
            pass


# What is wrong.


def test_a_call_without_a_token_is_refused(guarded: Guarded) -> None:
    guarded.refuses(guarded.files.security(role=None), "no token", "MA_TOKEN_FILE", reason=Reason.TOKEN_INVALID)


def test_a_call_with_a_wrong_token_is_refused(guarded: Guarded) -> None:
    security = Security(guarded.files.tls(), token=TOKENS[Role.CHIEF] + "x")
    guarded.refuses(security, "does not know the token", reason=Reason.TOKEN_INVALID)


def test_a_client_without_a_certificate_gets_no_connection(guarded: Guarded) -> None:
    guarded.refuses(
        guarded.files.security(Role.CHIEF, cert_file=None, key_file=None), guarded.address, "wants a certificate"
    )


def test_a_client_whose_certificate_an_unknown_authority_signed_gets_no_connection(guarded: Guarded) -> None:
    signed = guarded.files.stranger.sign("intruder")
    security = guarded.files.security(Role.CHIEF, cert_file=signed.cert, key_file=signed.key)
    guarded.refuses(security, "refuses the certificate", str(signed.cert), "--tls-client-ca")


def test_a_client_whose_certificate_has_expired_gets_no_connection(guarded: Guarded) -> None:
    old = guarded.files.authority.sign("old-client", expired=True)
    security = guarded.files.security(Role.CHIEF, cert_file=old.cert, key_file=old.key)
    guarded.refuses(security, "refuses the certificate", str(old.cert), "expired")


def test_a_client_in_plain_text_gets_no_connection_and_is_told_why(guarded: Guarded) -> None:
    guarded.refuses(Security(token_file=guarded.files.token(Role.CHIEF)), guarded.address, "wants TLS", "MA_TLS_CA")


def test_a_server_whose_authority_is_unknown_is_not_trusted(guarded: Guarded) -> None:
    ca = guarded.files.stranger.ca
    guarded.refuses(guarded.files.security(Role.CHIEF, ca_file=ca), str(ca), "authority", "MA_TLS_CA")


def test_a_server_whose_certificate_is_for_another_host_is_not_trusted(start_server: StartServer, files: Files) -> None:
    elsewhere = files.authority.sign("elsewhere", hosts=("ps.example",))
    guarded = Guarded.__new__(Guarded)
    address = start_server(1, security=replace(files.of_server, tls_cert=elsewhere.cert, tls_key=elsewhere.key)).address
    guarded.address, guarded.files = address, files
    with pytest.raises(SecurityError, match=r"is not for '127\.0\.0\.1'.*MA_TLS_SERVER_NAME"):
        session(address, files.security(Role.CHIEF))
    named = files.security(Role.CHIEF, server_name="ps.example")
    assert call_status(address, named).phase == pb.PHASE_UNINITIALIZED


def test_a_server_whose_certificate_has_expired_is_not_trusted(start_server: StartServer, files: Files) -> None:
    old = files.authority.sign("old-server", expired=True)
    address = start_server(1, security=replace(files.of_server, tls_cert=old.cert, tls_key=old.key)).address
    with pytest.raises(SecurityError, match=f"the certificate of {address} has expired"):
        session(address, files.security(Role.CHIEF))


def test_a_server_without_tls_is_not_taken_for_one_with_it(start_server: StartServer, files: Files) -> None:
    address = start_server(1).address
    with pytest.raises(SecurityError, match=f"{address} does not speak TLS"):
        session(address, files.security(Role.CHIEF))
