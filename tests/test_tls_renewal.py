"""Certificates on a worker's side: they are renewed while it runs, and a missing intermediate one is named."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.access.certificate_names import CertificateNames, broken_chain, certificates_in, shown_name
from modelaverage.access.channels import Access
from modelaverage.access.security import Security, Tls
from modelaverage.errors import SecurityError
from tests.certificates import Authority, Identity
from tests.ports import lasting_port
from tests.test_server_process import ServerProcess

CENTER = {"w": np.zeros(4, np.float32)}


def replaced(path: Path, content: bytes) -> Path:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    return beside.replace(path)


def flags_of(identity: Identity, authority: Authority, checkpoints: Path, port: int) -> list[str]:
    flags = ["--tls-cert", identity.cert, "--tls-key", identity.key, "--tls-client-ca", authority.ca]
    flags += ["--checkpoint-dir", checkpoints, "--bind", f"127.0.0.1:{port}"]
    return [str(flag) for flag in flags]


def test_a_worker_comes_back_with_a_renewed_authority_and_certificate(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    ca = replaced(tmp_path / "ca.pem", old.ca.read_bytes())
    first, second = old.sign("worker-before"), new.sign("worker-after")
    cert = replaced(tmp_path / "worker.pem", first.cert.read_bytes())
    key = replaced(tmp_path / "worker.key", first.key.read_bytes())
    port = lasting_port()
    with ServerProcess(*flags_of(old.sign("server-before"), old, tmp_path / "c", port), num_workers=1) as server:
        session = ParameterServerSession(
            [f"127.0.0.1:{port}"],
            worker_id="w",
            is_chief=True,
            security=Security(Tls(ca, cert, key)),
            reconnect_timeout_s=30,
        )
        session.initialize(CENTER)
        assert session.push_and_average(CENTER).global_step == 1
        server.signal(signal.SIGTERM)
        server.end()
    for path, content in ((ca, new.ca), (cert, second.cert), (key, second.key)):
        replaced(path, content.read_bytes())
    with session, ServerProcess(*flags_of(new.sign("server-after"), new, tmp_path / "c", port), num_workers=1):
        assert session.push_and_average(CENTER).global_step == 2


def test_files_that_cannot_be_used_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    ca = replaced(tmp_path / "ca.pem", authority.ca.read_bytes())
    port = lasting_port()
    with ServerProcess(
        *flags_of(authority.sign("s"), authority, tmp_path / "c", port)[:4], "--bind", f"localhost:{port}"
    ):
        access = Access(Security(Tls(ca)))
        with access.channel(f"localhost:{port}") as channel:
            call = channel.unary_unary("/modelaverage.v1.ParameterServer/GetStatus", None, None)
            assert call(b"", timeout=20)
            ca.write_text("half a certifi")
            assert call(b"", timeout=20)
            assert f"{ca} has no certificate" in caplog.text
            assert "still using the previous certificate" in caplog.text


def problem_of(cert: Identity, authority: Authority) -> str:
    port = lasting_port()
    flags = [str(flag) for flag in ("--tls-cert", cert.cert, "--tls-key", cert.key, "--bind", f"127.0.0.1:{port}")]
    with (
        ServerProcess(*flags),
        pytest.raises(SecurityError) as refused,
        ParameterServerSession(
            [f"127.0.0.1:{port}"], worker_id="w", security=Security(Tls(authority.ca)), connect_timeout_s=20
        ),
    ):
        pass
    return str(refused.value)


def test_an_intermediate_certificate_that_is_missing_is_named(tmp_path: Path) -> None:
    root = Authority(tmp_path, "root")
    between = Authority(tmp_path, "the one between", signed_by=root)
    server = between.sign("server")
    message = problem_of(server, root)
    assert "'the one between'" in message
    assert "append it to the server's own, in the file of its --tls-cert" in message
    server.cert.write_bytes(server.cert.read_bytes() + between.ca.read_bytes())
    port = lasting_port()
    with (
        ServerProcess("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--bind", f"127.0.0.1:{port}"),
        ParameterServerSession([f"127.0.0.1:{port}"], worker_id="w", security=Security(Tls(root.ca))) as session,
    ):
        assert session.status().num_workers == 2


def test_an_authority_that_is_not_trusted_is_no_matter_of_intermediate_ones(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    server = authority.sign("server")
    server.cert.write_bytes(server.cert.read_bytes() + authority.ca.read_bytes())
    message = problem_of(server, stranger)
    assert "intermediate" not in message
    assert "give the certificate of the authority that did" in message


def test_certificates_that_are_no_chain_are_said_at_the_start(tmp_path: Path) -> None:
    root, other = Authority(tmp_path, "root"), Authority(tmp_path, "other")
    server = root.sign("server")
    server.cert.write_bytes(server.cert.read_bytes() + other.ca.read_bytes())
    with ServerProcess("--tls-cert", str(server.cert), "--tls-key", str(server.key)) as process:
        process.signal(signal.SIGTERM)
        _, _, errors = process.end()
    assert (
        f"{server.cert} is not a whole chain: certificate 1 was signed by 'root', but certificate 2 is that of 'other'"
        in errors
    )


def test_names_are_read_as_they_stand(tmp_path: Path) -> None:
    root = Authority(tmp_path, "a root")
    between = Authority(tmp_path, "between", signed_by=root)
    leaf = between.sign("a leaf")
    chain = [certificates_in(path.read_text())[0] for path in (leaf.cert, between.ca, root.ca)]
    assert [(shown_name(one.subject), shown_name(one.issuer)) for one in chain] == [
        ("'a leaf'", "'between'"),
        ("'between'", "'a root'"),
        ("'a root'", "'a root'"),
    ]
    assert broken_chain(chain) is None
    assert broken_chain(chain[:1]) is None
    assert broken_chain([chain[0], chain[2]]) is not None
    assert certificates_in("-----BEGIN CERTIFICATE-----\nnonsense") == []
    for nonsense in (b"", b"\x30", b"\x30\x82\xff\xff", bytes(40)):
        with pytest.raises(ValueError, match="no certificate"):
            CertificateNames.of(nonsense)
