"""A server that cannot listen, or that does not answer, is named in one line."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from ma_client import ParameterServerSession
from modelaverage.access import handshake
from modelaverage.errors import InvalidRequestError, ServerUnavailableError
from ps_server.__main__ import main
from tests.bad_input.guarded import Job, assert_one_line
from tests.prepared import Prepared


@pytest.fixture(autouse=True)
def _one_look_at_why_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a server wants TLS is asked after the wait for its answer."""
    monkeypatch.setattr(handshake, "_TIMEOUT_S", 0.3)


def assert_fails_in_one_line(ended: tuple[int, str, str], *named: object) -> None:
    code, out, errors = ended
    assert code != 0
    assert out == ""
    assert errors.endswith("\n")
    assert_one_line(errors[:-1], *named)


@contextmanager
def deaf() -> Iterator[str]:
    """The address of a socket that listens and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def ps_server(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    process = Prepared("ps_server", *arguments, pipes=True)
    try:
        out, errors = process.communicate(timeout_s=20)
    finally:
        process.kill()
    return process.wait(), out, errors


def test_a_port_that_is_taken_is_named() -> None:
    with deaf() as address:
        assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", "--bind", address), address)


def test_a_port_that_another_parameter_server_has_is_named(job: Job) -> None:
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", "--bind", job.address), job.address)
    job.assert_still_serves()


@pytest.mark.parametrize(
    "bind",
    ["127.0.0.1", ":2222", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000", "127.0.0.1:-1", "[::1:0"]
    + ["127.0.0.1:\u00b2", "a..b:2222", "192.0.2.1:0"],
)
def test_an_address_where_nobody_can_listen_is_named(bind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--num-workers", "2", "--bind", bind]) != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_one_line(printed.err[:-1], bind)


def test_a_malformed_address_ends_the_process_with_one_line() -> None:
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", "--bind", "nonsense"), "nonsense", "HOST:PORT")


def test_a_ready_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "ready.json"
    bind = ("--bind", "127.0.0.1:0")
    assert_fails_in_one_line(ps_server("serve", "--num-workers", "2", *bind, "--ready-file", str(missing)), missing)


@contextmanager
def nobody() -> Iterator[str]:
    """An address where nothing listens."""
    with deaf() as address:
        pass
    yield address


@pytest.mark.parametrize("absent", [nobody, deaf])
def test_a_session_names_the_server_that_is_not_there(absent: Callable[[], AbstractContextManager[str]]) -> None:
    with absent() as address:
        begin_s = time.monotonic()
        with pytest.raises(ServerUnavailableError) as refused:
            ParameterServerSession([address], worker_id="a", connect_timeout_s=0.3)
        assert time.monotonic() - begin_s < 5
    assert_one_line(str(refused.value), address, "0.3 s")


@pytest.mark.parametrize("absent", [nobody, deaf])
def test_status_names_the_server_that_is_not_there(
    absent: Callable[[], AbstractContextManager[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with absent() as address:
        begin_s = time.monotonic()
        assert main(["status", address, "--timeout-s", "0.3"]) != 0
        assert time.monotonic() - begin_s < 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_one_line(printed.err[:-1], address, "0.3 s")


def test_the_status_process_fails_in_one_line() -> None:
    with nobody() as address:
        assert_fails_in_one_line(ps_server("status", address, "--timeout-s", "0.3"), address)


@pytest.mark.parametrize("address", ["", "127.0.0.1:99999"])
def test_status_of_an_address_that_is_none_fails_in_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", address, "--timeout-s", "0.3"]) != 0
    assert_one_line(capsys.readouterr().err[:-1], address)


@pytest.mark.parametrize("ps_hosts", [[], ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"], "127.0.0.1:1"])
def test_a_session_without_addresses_or_with_one_twice_is_refused(ps_hosts: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ParameterServerSession(ps_hosts, worker_id="a")
    assert_one_line(str(refused.value), "ps_hosts", "127.0.0.1:1" if ps_hosts else "[]")
