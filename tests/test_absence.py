"""A starting worker that waits for a server or a task index logs that it waits."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ma_client import ParameterServerSession
from ma_client.cluster.joining import join
from ma_client.transports.absence import NoticePace
from ma_client.transports.timing import Timing
from modelaverage.access import absence
from modelaverage.access.absence import no_answer
from modelaverage.access.channels import Access
from modelaverage.access.security import Security
from modelaverage.errors import DeadlineExceededError, ServerUnavailableError
from ps_server.console.export import ExportError, export
from ps_server.console.status import NoAnswerError, fetch
from tests.conftest import StartServer

NOWHERE = "127.0.0.1:1"
SOON_S = 0.05
QUIET = f"{NOWHERE} yet; trying for up to"


SOON = Timing(first_notice_s=SOON_S)


class TalkativeSession(ParameterServerSession):
    """A session that logs its waits at once instead of after seconds."""

    _timing = SOON


def test_a_wait_is_said_after_5_s_and_at_growing_gaps() -> None:
    pace, due_s = NoticePace(), []
    for _ in range(4):
        due_s.append(pace.due_s)
        pace.said()
    assert due_s == [5.0, 15.0, 35.0, 75.0]


def test_a_session_without_a_server_says_where_it_waits_and_for_how_long(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerUnavailableError, match=f"no parameter server answers at {NOWHERE}"):
        TalkativeSession([NOWHERE], worker_id="worker-0", connect_timeout_s=0.4)
    said = [record for record in caplog.records if QUIET in record.getMessage()]
    # At 0.05, 0.15 and 0.35 s; a busy machine may miss some.
    assert 1 <= len(said) <= 3
    assert said[0].getMessage() == f"no parameter server answers at {QUIET} 0.4 s (0 s so far)"
    assert {record.levelno for record in said} == {logging.WARNING}


def test_every_one_of_several_servers_is_named(caplog: pytest.LogCaptureFixture, start_server: StartServer) -> None:
    there, others = start_server(1).address, ["127.0.0.1:1", "127.0.0.1:2"]
    with pytest.raises(ServerUnavailableError):
        TalkativeSession([others[0], there, others[1]], worker_id="worker-0", connect_timeout_s=0.4)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert all(f"{address} yet" in said for address in others)
    assert there not in said


def test_nothing_is_said_once_the_server_is_there(caplog: pytest.LogCaptureFixture, start_server: StartServer) -> None:
    with TalkativeSession([start_server(1).address], worker_id="worker-0"):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "ma_client-absence"]
    assert " yet" not in " ".join(record.getMessage() for record in caplog.records if "absence" in record.pathname)


def test_without_threads_a_session_waits_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        if thread.name == "ma_client-absence":
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(ServerUnavailableError, match=f"no parameter server answers at {NOWHERE}"):
        TalkativeSession([NOWHERE], worker_id="worker-0", connect_timeout_s=0.2)


def test_a_process_that_waits_for_a_server_to_give_it_an_index_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerUnavailableError):
        join(NOWHERE, 0.4, timing=SOON)
    assert any(QUIET in record.getMessage() for record in caplog.records)


def test_a_process_that_waits_for_a_free_index_says_so_again(
    caplog: pytest.LogCaptureFixture, start_server: StartServer
) -> None:
    address = start_server(1).address
    code = f"from ma_client.cluster.spec import ClusterSpec; ClusterSpec.resolve({{}}, ps_hosts=({address!r},), "
    code += "task_index='auto'); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it has the only index
        with pytest.raises(DeadlineExceededError, match=f"all 1 of {address} are taken"):
            join(address, 0.5, timing=SOON)
        other.communicate("\n", timeout=60)
    said = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("has waited 0 s for a task index: ") for text in said)


def test_a_script_that_has_never_heard_of_logging_shows_it() -> None:
    code = (
        "from ma_client import ParameterServerSession\n"
        "from ma_client.transports.timing import Timing\n"
        f"ParameterServerSession._timing = Timing(first_notice_s={SOON_S})\n"
        f"ParameterServerSession([{NOWHERE!r}], worker_id='worker-0', connect_timeout_s=0.3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"no parameter server answers at {QUIET} 0.3 s")


def no_such_name(host: str, *_: object) -> list[object]:
    raise socket.gaierror(socket.EAI_NONAME, f"there is no {host}")


def test_a_host_name_that_is_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    address, unknown = "localhost:1", "'localhost' is unknown here .there is no localhost.; check its spelling"
    with pytest.raises(ServerUnavailableError, match=unknown):
        ParameterServerSession([address], worker_id="worker-0", connect_timeout_s=0.2)
    with pytest.raises(NoAnswerError, match=unknown):
        fetch(address, 0.2, Access(Security()))
    with pytest.raises(ExportError, match=unknown):
        export([address], Path("never-written"), 0.2, Access(Security()))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "unix:/no/such/socket"])
def test_an_address_without_a_name_is_not_looked_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    assert no_answer(address, 3.0, "is it there?") == (
        f"no parameter server answers at {address} (waited 3 s); is it there?"
    )


def test_a_lookup_that_hangs_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(absence, "_LOOKUP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: over.wait(20.0))
    assert no_answer("localhost:1", 3.0) == "no parameter server answers at localhost:1 (waited 3 s)"
    over.set()
