"""Access: every wrong credential is refused and changes nothing; with TLS no tensor is in plain text."""

from __future__ import annotations

import json
import queue
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from ma_client import Outcome, ParameterServerSession, Security, SecurityError, Tls
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.channels import Access
from modelaverage.access.handshake import problem
from modelaverage.errors import Reason, refusal_metadata
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.edge.security import ServerSecurity, check_exposure, warnings_of
from ps_server.rules.authorization import LEAST_ROLES, Role, Tokens, check
from ps_server.transports.data_port import DataPort
from tests.certificates import Authority, Identity
from tests.conftest import RunningServer, StartServer
from tests.launched import Launched
from tests.pairs import Pair
from tests.raw_client import DEADLINE_S
from tests.tls_proxy import TlsProxy
from tests.wiretap import Wiretap

CENTER = {"w": np.arange(100, dtype=np.float32)}
# The chief has a token of its own: so have workers, and who only reads.
TOKENS = {
    Role.CHIEF: "chief-0123456789abcdef",
    Role.WORKER: "worker-0123456789abcdef",
    Role.READER: "reader-0123456789ab",
}
SERVICE = "/modelaverage.v1.ParameterServer/"


@dataclass(frozen=True)
class Files:
    """An authority, another one that nobody trusts, and tokens."""

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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("secrets")
    for role, token in TOKENS.items():
        (directory / role.name).write_text(f"{token}\n")
    authority, stranger = Authority(directory), Authority(directory, "stranger")
    return Files(directory, authority, stranger, authority.sign("server"), authority.sign("client"))


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


@pytest.fixture
def guarded(start_server: StartServer, files: Files) -> Guarded:
    return Guarded(start_server(1, security=files.of_server), files)


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


def test_a_worker_may_not_initialize(start_server: StartServer, files: Files) -> None:
    address = start_server(1, security=files.of_server).address
    with session(address, files.security(Role.WORKER), is_chief=True) as worker:
        with pytest.raises(SecurityError, match="a worker's token may not call Initialize") as refused:
            worker.initialize(CENTER)
        assert refused.value.reason is Reason.ROLE_INSUFFICIENT
    assert call_status(address, files.security(Role.READER)).phase == pb.PHASE_UNINITIALIZED


def test_a_reader_may_not_push(guarded: Guarded) -> None:
    with session(guarded.address, guarded.files.security(Role.READER)) as reader:
        reader.pull()
        with pytest.raises(SecurityError, match="a reader's token may not call PushAndAverage") as refused:
            reader.push_and_average({"w": CENTER["w"] + 1})
        assert refused.value.reason is Reason.ROLE_INSUFFICIENT
    guarded.is_unchanged()


REFUSED_FOR_ROLE = ("PERMISSION_DENIED", "ROLE_INSUFFICIENT")
METHODS = [f"{SERVICE}{method.name}" for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]


def test_every_call_of_the_protocol_has_its_least_role() -> None:
    assert set(METHODS) <= LEAST_ROLES.keys()


def test_every_call_with_too_small_a_role_is_refused_before_anything_of_it_is_read(guarded: Guarded) -> None:
    for role in (None, Role.READER, Role.WORKER):
        access = Access(guarded.files.security(role))
        for method in METHODS:
            if role is not None and role >= LEAST_ROLES[method]:
                continue
            nothing = queue.SimpleQueue[bytes]()  # the client sends no message, and leaves the stream open
            with access.channel(guarded.address) as channel:
                rpc: Any = channel.stream_stream(method, bytes, bytes)
                call = rpc(iter(nothing.get, b""), DEADLINE_S, access.metadata)
                with pytest.raises(grpc.RpcError) as refused:
                    next(call)
                nothing.put(b"")
            status, reason = ("UNAUTHENTICATED", "TOKEN_INVALID") if role is None else REFUSED_FOR_ROLE
            assert refused.value.code() is grpc.StatusCode[status], (role, method)
            error: Any = refused.value
            assert set(refusal_metadata(Reason[reason])) <= set(error.trailing_metadata())
    guarded.is_unchanged()


@pytest.mark.parametrize("method", [*METHODS, "/another.Service/Method"])
@pytest.mark.parametrize("role", Role)
def test_a_call_needs_its_least_role_and_an_unknown_one_the_greatest(method: str, role: Role) -> None:
    error = check(Tokens({"known": role}), method, ["known"])
    if role >= LEAST_ROLES.get(method, Role.CHIEF):
        assert error is None
    else:
        assert error is not None
        assert error.reason is Reason.ROLE_INSUFFICIENT


@pytest.mark.parametrize("sent", [[], [""], ["other"], ["known", "known"], ["known "], ["\udcff"], ["knöwn"]])
def test_none_but_exactly_one_known_token_will_do(sent: list[str]) -> None:
    error = check(Tokens({"known": Role.CHIEF}), METHODS[0], sent)
    assert error is not None
    assert error.reason is Reason.TOKEN_INVALID
    assert check(Tokens({"known": Role.CHIEF}), "/grpc.health.v1.Health/Check", sent) is None


# On the wire.


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_with_tls_no_tensor_is_in_plain_text_on_the_wire_and_without_it_is(
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
    """How many of the pieces of 32 bytes of ``values`` occur; frames' headers cut a few of them in two."""
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
    # A server that would offer some: it has no TLS itself.
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
def test_where_nobody_answers_the_trouble_is_not_with_certificates(address: str, tls: Tls | None) -> None:
    assert problem(address, tls) is None


def test_a_server_that_works_has_no_problem(guarded: Guarded, start_server: StartServer) -> None:
    assert problem(guarded.address, guarded.files.tls()) is None
    assert problem(start_server(1).address, None) is None


# Renewed files.


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


# Files and flags that are wrong.


def test_files_that_are_missing_or_wrong_are_named_at_the_start_on_both_sides(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, missing, client, server = tmp_path / "text", tmp_path / "missing", files.client, files.server
    text.write_text("hello")
    ca, token = files.authority.ca, files.token(Role.WORKER)
    for cert, key, authority, words in (
        (missing, client.key, ca, [str(missing), "No such file"]),
        (text, client.key, ca, [str(text), "no certificate in PEM form"]),
        (client.cert, missing, ca, [str(missing), "No such file"]),
        (client.cert, client.cert, ca, [str(client.cert), "no private key"]),
        (client.cert, server.key, ca, [str(client.cert), str(server.key), "does not belong"]),
        (client.cert, client.key, missing, [str(missing), "No such file"]),
        (client.cert, client.key, client.key, [str(client.key), "no certificate in PEM form"]),
    ):
        flags = ["--tls-cert", str(cert), "--tls-key", str(key)]
        assert_refused(capsys, ["status", "127.0.0.1:1", "--tls-ca", str(authority), *flags], words)
        serve = ["serve", "--num-workers", "1", "--bind", "127.0.0.1:0"]
        assert_refused(capsys, [*serve, *flags, "--tls-client-ca", str(authority)], words)
    for content, words in (
        ("", ["has no token", "openssl rand"]),
        ("short", ["line 1", "16 to 512"]),
        ("two words of a token", ["line 1"]),
        (f"{TOKENS[Role.WORKER]}\nshort", ["line 2"]),
        ("ä" * 20, ["a character"]),
    ):
        text.write_text(content)
        assert_refused(capsys, ["status", "127.0.0.1:1", "--token-file", str(text)], [str(text), *words])
        assert_refused(capsys, [*serve, "--token-file", str(text)], [str(text), *words])
    both = ["--token-file", str(token), "--reader-token-file", str(token)]
    assert_refused(capsys, [*serve, *both], [str(token), "in common"])


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(files: Files) -> None:
    locked = files.authority.sign("locked", passphrase=b"secret")
    with pytest.raises(SecurityError, match=r"locked\.key.*passphrase"):
        Access(Security(Tls(cert_file=locked.cert, key_file=locked.key)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-cert", "x"], ["--tls-cert needs --tls-key"]),
        (["--tls-key", "x"], ["--tls-key needs --tls-cert"]),
        (["--tls-client-ca", "x"], ["--tls-client-ca needs --tls-cert"]),
        (["--chief-token-file", "x"], ["--chief-token-file needs --token-file"]),
        (["--reader-token-file", "x"], ["--reader-token-file needs --token-file"]),
        (["--bind", "0.0.0.0:0"], ["--bind 0.0.0.0:0", "--tls-cert", "--token-file", "--insecure"]),
        (["--bind", "[::]:0"], ["--bind [::]:0", "--insecure"]),
    ],
)
def test_flags_that_need_others_name_them(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert_refused(capsys, ["serve", "--num-workers", "1", *flags], words)


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not any(token in error for token in TOKENS.values())


def test_a_token_is_shown_nowhere() -> None:
    assert "secret" not in repr(Security(token="secret-secret-secret"))
    with pytest.raises(SecurityError) as refused:
        Security(token="secret secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(SecurityError, match="has to be in a file"):
        Security(token="secret-secret-secret").to_env()


# Where strangers may come.

PLAIN = ServerSecurity()
TOKEN = ServerSecurity(token_file=Path("token"))
TLS = ServerSecurity(Path("cert"), Path("key"))
MUTUAL = replace(TLS, tls_client_ca=Path("ca"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_exposure(host, host, PLAIN)
    assert warnings_of(host, host, PLAIN) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "2001:db8::1"])
def test_elsewhere_something_keeps_strangers_out_or_it_is_said_that_nothing_does(host: str) -> None:
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


# Whole processes.


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


def test_commands_train_show_and_export_over_mutual_tls_with_tokens(files: Files, tmp_path: Path) -> None:
    of_server = files.of_server
    flags = [
        "--tls-cert",
        of_server.tls_cert,
        "--tls-key",
        of_server.tls_key,
        "--tls-client-ca",
        of_server.tls_client_ca,
    ]
    flags += ["--token-file", of_server.token_file, "--chief-token-file", of_server.chief_token_file]
    flags += ["--reader-token-file", of_server.reader_token_file]
    reader = flags_of(files.security(Role.READER))
    with serving("--bind", "127.0.0.1:0", *map(str, flags)) as address:
        train = ["-m", "ps_worker", "digits", "--ps-hosts", address, "--num-workers", "2"]
        train += ["--steps", "20", "--interval-steps", "20"]
        train += ["--interval-steps", "10"]
        with (
            Launched([*train, "--task-index", "0", *flags_of(files.security(Role.CHIEF))]) as chief,
            # The other one is told by its environment.
            Launched([*train, "--task-index", "1"], environ=files.security(Role.WORKER).to_env()) as worker,
        ):
            assert [chief.ended(), worker.ended()] == [0, 0], chief.printed() + worker.printed()
        with Launched(["-m", "ps_server", "status", address, "--json", *reader]) as status:
            assert status.ended() == 0, status.printed()
            assert json.loads("".join(status.lines))["global_step"] == 2
        out = tmp_path / "center.safetensors"
        with Launched(["-m", "ps_server", "export", address, str(out), *reader]) as export:
            assert export.ended() == 0, export.printed()
        assert out.stat().st_size > 1000
        for command in (["status", address], ["export", address, str(out)]):
            without_token = flags_of(files.security(role=None))
            with Launched(["-m", "ps_server", *command, *without_token]) as refused:
                assert refused.ended() == 1
                assert len(refused.errors) == 1
                assert "no token" in refused.errors[0]
        with Launched(["-m", "ps_server", "status", address, "--timeout-s", "0.5"]) as refused:
            assert refused.ended() == 1
            assert refused.errors == [
                f"ps-server: {address} wants TLS; say which authority signed its certificate "
                "(Tls(ca_file=...) or MA_TLS_CA)"
            ]


def test_a_script_finds_in_its_environment_what_the_command_was_told(files: Files, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from ma_client import Security\nprint(sorted(Security.from_env().to_env().values()))\n")
    security = files.security(Role.WORKER)
    run = ["-m", "ps_worker", "run", "--ps-hosts", "127.0.0.1:1", "--num-workers", "1", "--task-index", "0"]
    with Launched([*run, *flags_of(security), str(script)]) as ran:
        assert ran.ended() == 0, ran.printed()
    assert ran.lines == [str(sorted(security.to_env().values()))]


def test_a_server_that_strangers_can_reach_says_so() -> None:
    with Launched(["-m", "ps_server", "serve", "--num-workers", "1", "--bind", "0.0.0.0:0", "--insecure"]) as server:
        server.wait_for(
            "listening on", "0.0.0.0:0 is --insecure: anyone who can reach it can read and replace the model"
        )
