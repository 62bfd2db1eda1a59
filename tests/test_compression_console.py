"""Compression in `ps-server status` and its live view: the name, and the bytes on the wire and before coding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from ps_server.console.status import Seen, as_text, differing_choices
from ps_server.console.watch import line
from tests.conftest import StartServer
from tests.test_outer_console import shard
from tests.test_watch import drawn, waiting, without_styles

MIB = 1 << 20


def coded(compression: str = "int8") -> pb.GetStatusResponse:
    status = waiting()
    status.compression = compression
    status.model_size_bytes = 2 * MIB
    status.received_bytes, status.received_raw_bytes = 12 * MIB, 49 * MIB
    status.sent_bytes, status.sent_raw_bytes = 13 * MIB, 50 * MIB
    return status


def words_of(text: str) -> str:
    """The text of a picture, without its frame and its ends of lines."""
    return " ".join(" ".join(row.strip("│ ") for row in text.splitlines()).split())


def test_the_status_has_the_compression_and_the_bytes_before_coding() -> None:
    said = "12.0 MiB received (49.0 MiB before coding), 13.0 MiB sent (50.0 MiB before coding)"
    for text in (as_text(coded()), without_styles(drawn(Seen("ps:2222", coded())))):
        assert f"moved {said}" in words_of(text)
        assert "compression int8" in words_of(text)
    assert ", compression int8, " in line(Seen("ps:2222", coded()))


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_both_numbers_fit_a_small_terminal(columns: int) -> None:
    for text in (as_text(coded(), columns), without_styles(drawn(Seen("ps:2222", coded()), width=columns))):
        assert max(map(len, text.splitlines())) <= columns
        assert "(50.0 MiB before coding)" in words_of(text)


def test_without_compression_the_bytes_are_told_once() -> None:
    status = coded("")
    status.received_raw_bytes, status.sent_raw_bytes = status.received_bytes, 0  # 0: an older server
    for text in (as_text(status), without_styles(drawn(Seen("ps:2222", status)))):
        assert "12.0 MiB received, 13.0 MiB sent" in text
        assert "compression none" in words_of(text)
        assert "before coding" not in text
    assert "compression" not in line(Seen("ps:2222", status))


def test_a_server_without_a_center_has_no_compression() -> None:
    status = pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)
    for text in (as_text(status), drawn(Seen("ps:2222", status)), line(Seen("ps:2222", status))):
        assert "compression" not in text


def test_a_compression_of_a_newer_server_is_shown_as_text() -> None:
    status = coded("zip\x1b[2J[red]\n" + "x" * 500)
    for text in (as_text(status, 80), drawn(Seen("ps:2222", status), width=80)):
        assert "\x1b[2J" not in text
        assert max(map(len, without_styles(text).splitlines())) <= 80


def test_servers_of_one_job_with_different_compressions_are_an_alarm() -> None:
    servers = [shard("ps0:1", "sgd:lr=0.5"), shard("ps1:1", "")]
    for server, compression in zip(servers, ("int4", ""), strict=True):
        assert server.status is not None
        server.status.compression = compression
    said = [
        "OUTER OPTIMIZERS DIFFER within one job: ps0:1 has sgd:lr=0.5; ps1:1 has average",
        "COMPRESSIONS DIFFER within one job: ps0:1 has int4; ps1:1 has none",
    ]
    assert differing_choices(servers) == said
    for warning in said:
        assert warning in without_styles(drawn(*servers))
    assert len(without_styles(drawn(*servers, height=24)).splitlines()) <= 24


def test_the_command_shows_it(start_server: StartServer, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(1)
    values = {"w": np.arange(1 << 18, dtype=np.float32)}
    with ParameterServerSession([server.address], worker_id="a", is_chief=True, shared_memory=False) as session:
        session.initialize(values, compression="int4")
        session.pull()
        for _ in range(5):
            session.push_and_average(values)
    assert main(["status", server.address]) == 0
    printed = words_of(capsys.readouterr().out)
    assert "compression int4" in printed
    # The initial values and the first pull are raw; of each round, 0.1328 of the bytes go up, and as many down.
    assert "moved 1.7 MiB received (6.0 MiB before coding), 1.7 MiB sent (6.0 MiB before coding)" in printed
    assert main(["status", server.address, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compression"] == "int4"
    assert found["received_raw_bytes"] == found["sent_raw_bytes"] == 6 * values["w"].nbytes
    assert found["received_bytes"] == found["sent_bytes"] < 0.28 * found["sent_raw_bytes"]
