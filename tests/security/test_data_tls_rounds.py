"""Rounds on data connections over TLS: encrypted, renewed while the job runs, and lost without losing anything."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from ma_client import DataSettings, Outcome, ParameterServerSession, Security, Tls
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.contexts import Encryption
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.edge.credentials import ServerTls
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role
from tests.certificates import Authority, Identity
from tests.conftest import StartServer
from tests.cut_connection import break_after
from tests.pairs import SETTINGS, Pair
from tests.security.data_tls import TIMEOUT_S
from tests.security.guarded import Files
from tests.wiretap import Wiretap


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[DataSocket]:
    """The data connections that sessions have opened."""
    sockets, open_one = list[DataSocket](), DataSocket.open

    def noted(host: str, offer: pb.DataConnection, settings: DataSettings, encryption: Encryption) -> DataSocket:
        sockets.append(open_one(host, offer, settings, encryption))
        return sockets[-1]

    monkeypatch.setattr(DataSocket, "open", noted)
    return sockets


def secure(connection: DataSocket) -> ssl.SSLSocket:
    assert isinstance(connection._socket, ssl.SSLSocket)
    return connection._socket


def test_with_mutual_tls_and_tokens_rounds_use_data_connections_in_tls_1_3(
    start_server: StartServer, files: Files, opened: list[DataSocket]
) -> None:
    address = start_server(2, security=files.of_server).address
    with Pair(address, security=files.security(Role.CHIEF)) as pair:
        pair.until_connected()
        for _ in range(3):
            pair.round()
            assert pair.transports == {pb.TRANSPORT_DATA_CONNECTION}
        assert [secure(connection).version() for connection in opened] == ["TLSv1.3"] * 2


def test_nothing_of_a_model_is_in_plain_text_on_a_data_connection(
    start_server: StartServer, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps, open_one = list[Wiretap](), DataSocket.open
    model = {"w": np.random.default_rng(0).integers(0, 1 << 16, 1 << 16).astype(np.float32)}
    with ExitStack() as stack:

        def tapped(host: str, offer: pb.DataConnection, settings: DataSettings, encryption: Encryption) -> DataSocket:
            taps.append(stack.enter_context(Wiretap(f"127.0.0.1:{offer.port}")))
            port = int(taps[-1].address.rpartition(":")[2])
            return open_one(host, pb.DataConnection(port=port, key=offer.key), settings, encryption)

        monkeypatch.setattr(DataSocket, "open", tapped)
        address = start_server(2, security=files.of_server).address
        with Pair(address, security=files.security(Role.CHIEF), model=model) as pair:
            pair.until_connected()
            seen = [model["w"] + np.float32(number) for number in range(2 * pair.rounds + 2)]
        recorded = [data for tap in taps for data in tap.recorded]
    assert len(recorded) == 4
    for data in recorded:
        assert len(data) > model["w"].nbytes
        for values in seen:
            assert values[:16].tobytes() not in data
            assert values[-16:].tobytes() not in data


@pytest.mark.parametrize("after_bytes", [0, 7, 8, 300, 2823])
@pytest.mark.parametrize("direction", ["send", "receive"])
def test_an_encrypted_connection_that_breaks_anywhere_loses_nothing(
    start_server: StartServer, files: Files, monkeypatch: pytest.MonkeyPatch, direction: str, after_bytes: int
) -> None:
    address = start_server(2, security=files.of_server).address
    with Pair(address, security=files.security(Role.CHIEF)) as pair:
        pair.until_connected()
        with monkeypatch.context() as patch:
            break_after(patch, direction, after_bytes)
            outcomes = {result.outcome for result in pair.round()}
        assert outcomes <= {Outcome.COMMITTED, Outcome.ALREADY_COUNTED}
        pair.until_connected()


def test_a_port_that_shows_a_foreign_certificate_gets_nothing_and_the_worker_says_what_to_do(
    start_server: StartServer, files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = files.stranger.sign("impostor of the port")
    monkeypatch.setattr(ServerTls, "context", ServerTls(foreign.cert, foreign.key, None).context)
    address = start_server(2, security=files.of_server).address
    with Pair(address, security=files.security(Role.CHIEF)) as pair:
        while caplog.text.count("no data connection to") < 2:
            pair.round()
        assert pair.transports == {pb.TRANSPORT_TCP}
    assert f"no authority in {files.authority.ca} signed the certificate" in caplog.text
    assert "MA_TLS_CA" in caplog.text


# Renewal.


def replaced(path: Path, source: Path) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(source.read_bytes())
    beside.replace(path)


def test_all_certificates_are_replaced_while_a_job_runs(
    start_server: StartServer, tmp_path: Path, opened: list[DataSocket]
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    ca = tmp_path / "ca.pem"
    server, worker = (Identity(tmp_path / f"{name}.crt", tmp_path / f"{name}.key") for name in ("ps", "worker"))

    def use(authority: Authority, name: str) -> Path:
        """Replaces all files by ones of this authority; gives the server's certificate."""
        replaced(ca, authority.ca)
        for identity, signed in (
            (server, authority.sign(f"server {name}")),
            (worker, authority.sign(f"worker {name}")),
        ):
            replaced(identity.cert, signed.cert)
            replaced(identity.key, signed.key)
        return server.cert

    shown = [use(old, "before").read_text()]
    address = start_server(2, security=ServerSecurity(server.cert, server.key, ca)).address
    with Pair(address, security=Security(Tls(ca, worker.cert, worker.key)), reconnect_timeout_s=TIMEOUT_S) as pair:
        pair.until_connected()
        shown.append(use(new, "after").read_text())
        pair.round()
        for connection in list(opened):
            connection.break_off()
        pair.until_connected()
        assert len(opened) == 4
        certificates = [secure(connection).getpeercert(binary_form=True) for connection in opened[2:]]
        assert certificates == [ssl.PEM_cert_to_DER_cert(shown[1])] * 2


# A worker that dies.

DIES = """
import os, signal, sys
import numpy as np
from ma_client import DataSettings, ParameterServerSession, Security, Tls
from modelaverage.runtime.encrypted_socket import EncryptedSocket

send, sent = EncryptedSocket.send, 0

def send_and_die(self, data):
    global sent
    sent += send(self, data[:20_000])
    if sent >= 40_000:
        os.kill(os.getpid(), signal.SIGKILL)
    return min(len(data), 20_000)

EncryptedSocket.send = send_and_die
address, ca, cert, key, token = sys.argv[1:]
session = ParameterServerSession(
    [address], worker_id="b", shared_memory=False, data_connections=DataSettings(least_bytes=0),
    security=Security(Tls(ca, cert, key), token_file=token),
)
session.pull()
while True:
    session.push_and_average({"w": np.full(1 << 15, 3, np.float32)})
"""


@pytest.fixture
def dying(start_server: StartServer, files: Files) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    address = start_server(2, security=files.of_server).address
    arguments = [address, files.authority.ca, files.client.cert, files.client.key, files.token(Role.WORKER)]
    with subprocess.Popen([sys.executable, "-c", DIES, *map(str, arguments)]) as process:
        yield address, process
        with suppress(ProcessLookupError):
            process.kill()


def test_a_worker_killed_within_a_push_over_tls_leaves_nothing_of_it_in_the_average(
    dying: tuple[str, subprocess.Popen[bytes]], files: Files
) -> None:
    address, process = dying
    ours = {"w": np.ones(1 << 15, np.float32)}

    def session(worker_id: str) -> ParameterServerSession:
        return ParameterServerSession(
            [address],
            worker_id=worker_id,
            is_chief=worker_id == "a",
            shared_memory=False,
            fragment_size_bytes=1024,
            data_connections=SETTINGS,
            security=files.security(Role.CHIEF),
        )

    with session("a") as a, ThreadPoolExecutor(1) as thread:
        a.initialize({"w": np.zeros(1 << 15, np.float32)})

        def work() -> list[float]:
            results = [a.push_and_average(ours, timeout_s=60.0) for _ in range(20)]
            return [value for result in results for value in np.unique(result.center["w"]).tolist()]

        working = thread.submit(work)
        assert process.wait(60) == -signal.SIGKILL
        with session("b") as b:
            _, step = b.pull()
            assert 0 < step < 20
            while step < 20:
                step = b.push_and_average({"w": np.full(1 << 15, 3, np.float32)}, timeout_s=60.0).global_step
        assert working.result(60) == [2.0] * 20
