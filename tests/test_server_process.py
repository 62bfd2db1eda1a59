"""The server as a process: how it starts and ends, what it prints, and which clients it considers gone."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode

import ps_server.server
from ma_client import ParameterServerSession
from ma_client.transports.timing import Timing
from modelaverage.errors import ConflictError, DeadlineExceededError, Reason, ServerUnavailableError
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.__main__ import main
from tests.conftest import StartServer
from tests.jobs import CENTER, COUNT, STEP, Job, of, worker
from tests.prepared import Prepared
from tests.raw_client import Arrays, RawClient, flat_bytes, fragments_of, push_header, rest_of_center, until

# The process.


class ServerProcess:
    """`ps-server serve` on a free port; killed at the end if it has not ended by then.

    Attributes:
        line: the first line that it printed; empty if it ended without output.
        data_line: the line with the addresses of data connections; empty if there is none.
    """

    def __init__(self, *arguments: str, num_workers: int = 2) -> None:
        flags = ["--bind", "127.0.0.1:0", "--num-workers", str(num_workers)]
        self._process = Prepared("ps_server", "serve", *flags, *arguments, pipes=True)
        # If it never prints a line, killing it ends the wait.
        watchdog = threading.Timer(20, self._process.kill)
        watchdog.start()
        self.line = self._process.stdout.readline()
        has_data_line = bool(self.line) and not {"off", "--data-port=off", "--tls-cert"} & set(arguments)
        self.data_line = self._process.stdout.readline() if has_data_line else ""
        watchdog.cancel()
        self.address = self.line.split()[-1] if self.line else ""
        self.pid = self._process.pid

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Waits, for a few seconds, for the end: exit code, and what it printed besides its first lines."""
        out, err = self._process.communicate(timeout_s=8)
        return self._process.wait(), out, err


def test_a_push_whose_round_has_committed_gets_its_outcome_though_the_server_stops() -> None:
    model: Arrays = {"w": np.zeros(4 << 20, np.float32)}
    with ServerProcess(num_workers=1) as server, RawClient(server.address) as client:
        client.initialize(model, fragment_size_bytes=1 << 20)
        header, _ = client.pull()
        stream = client.open_push()
        stream.send(push_header(header.manifest_id, "w", base_step=header.global_step))
        stream.admission()
        stream.give(fragments_of(model, 1 << 20))
        until(lambda: client.status().global_step == header.global_step + 1, "the round commits")
        server.signal(signal.SIGTERM)
        until(lambda: is_stopping(client), "the server stops")
        outcome, center = stream.answer()
        assert outcome.outcome == pb.OUTCOME_COMMITTED
        assert len(center) == model["w"].nbytes


def is_stopping(client: RawClient) -> bool:
    """Whether the server turns new calls away because it was told to stop."""
    stream = client.open_initialize()
    stream.half_close()
    return stream.refusal().reason == "SERVER_STOPPING"


def test_the_ready_file_and_the_printed_lines_have_the_real_addresses(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    with ServerProcess("--ready-file", str(ready)) as server:
        assert server.line == f"ps-server: listening on {server.address}\n"
        said = json.loads(ready.read_text())
        assert said == {
            "address": server.address,
            "addresses": [server.address],
            "pid": server.pid,
            "data_port": said["data_port"],
        }
        assert server.data_line == f"ps-server: data connections at 127.0.0.1:{said['data_port']}\n"
        socket.create_connection(("127.0.0.1", said["data_port"]), timeout=5).close()
        assert list(tmp_path.iterdir()) == [ready]
        host, port = server.address.split(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        with RawClient(server.address) as client:
            assert client.status().phase == pb.PHASE_UNINITIALIZED
        server.signal(signal.SIGTERM)
        assert server.end() == (0, "", "")


def test_a_server_without_data_connections_announces_none(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    with ServerProcess("--ready-file", str(ready), "--data-port=off") as server:
        assert json.loads(ready.read_text()).keys() == {"address", "addresses", "pid"}
        server.signal(signal.SIGTERM)
        assert server.end() == (0, "", "")


def test_data_connections_of_several_addresses_are_announced_together() -> None:
    with ServerProcess("--bind", "[::1]:0", "--bind", "127.0.0.1:0") as server:
        found = re.fullmatch(r"ps-server: data connections at 127\.0\.0\.1:(\d+), \[::1\]:(\d+)\n", server.data_line)
        assert found is not None, server.data_line
        assert found[1] == found[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_refuses_waiting_calls_and_exits_with_0(number: signal.Signals) -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        waiting_pull = client.open_pull()
        waiting_pull.send(pb.PullRequest(worker_id="early", wait_initialized=True))
        waiting_pull.half_close()
        job = Job(client, server.address)
        assert waiting_pull.receive().header.global_step == STEP
        assert rest_of_center(waiting_pull) == flat_bytes(CENTER)
        push = job.push("a", of(1))
        job.given("a", COUNT)
        server.signal(number)
        refusal = push.refusal()
        assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "SERVER_STOPPING")
        assert server.end() == (0, "", "")


def test_a_pull_that_waits_for_the_chief_is_refused_when_the_server_stops() -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        stream = client.open_pull()
        stream.send(pb.PullRequest(worker_id="early", wait_initialized=True))
        stream.half_close()
        until(lambda: client.worker("early").worker_id == "early", "the pull waits")
        server.signal(signal.SIGTERM)
        refusal = stream.refusal()
        assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "SERVER_STOPPING")
        assert server.end() == (0, "", "")


def test_a_round_that_can_finish_is_finished_before_the_server_exits() -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        a = job.push("a", of(1))
        b, _ = job.admitted("b")
        b.give(fragments_of(of(3)), 0, 2)
        job.given("b", 2)
        server.signal(signal.SIGTERM)
        until(lambda: is_stopping(client), "the server stops")
        b.give(fragments_of(of(3)), 2)
        b.half_close()
        for stream in (a, b):
            outcome, center = stream.answer()
            assert (outcome.outcome, center) == (pb.OUTCOME_COMMITTED, flat_bytes(of(2)))
        assert server.end() == (0, "", "")


def test_the_status_of_a_server_that_stops_says_so() -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        streams = [job.push("a", of(1)), job.admitted("b")[0]]
        server.signal(signal.SIGTERM)
        until(lambda: is_stopping(client), "the server stops")
        assert client.status().phase == pb.PHASE_STOPPING
        streams[1].give(fragments_of(of(1)))
        for stream in streams:
            stream.answer()


def test_a_second_sigterm_ends_the_server_at_once() -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        job.push("a", of(1))
        job.admitted("b")  # never gives anything: the server would wait for it for a while
        server.signal(signal.SIGTERM)
        until(lambda: is_stopping(client), "the server stops")
        server.signal(signal.SIGTERM)
        assert server.end() == (-signal.SIGTERM, "", "")


def test_a_second_ctrl_c_ends_the_server_without_a_traceback() -> None:
    with ServerProcess() as server, RawClient(server.address) as client:
        job = Job(client, server.address)
        job.push("a", of(1))
        job.admitted("b")
        server.signal(signal.SIGINT)
        until(lambda: is_stopping(client), "the server stops")
        server.signal(signal.SIGINT)
        code, out, err = server.end()
        assert code != 0
        assert (out, "Traceback" in err) == ("", False), err


# The command line.


def test_help_says_that_anybody_can_read_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.rpartition("--metrics-bind ADDRESS")[2].split())
    assert "not encrypted and not authenticated" in text.partition("--verbose")[0]


@pytest.mark.parametrize("command", [[], ["serve"], ["status"]])
def test_help_is_complete_and_has_units(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "": ["serve", "status"],
        "serve": [
            "--bind ADDRESS",
            "--num-workers N",
            "--ready-file FILE",
            "SECONDS",
            "BYTES",
            "--log-json",
            "examples:",
        ],
        "status": ["ADDRESS", "--json", "--watch [SECONDS]", "--timeout-s SECONDS", "examples:"],
    }
    for shown in expected["".join(command)]:
        assert shown in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["serve"], "--num-workers"),
        (["serve", "--num-workers", "0"], "--num-workers"),
        (["serve", "--num-workers", "two"], "two"),
        (["serve", "--num-workers", "1.5"], "1.5"),
        (["serve", "--num-workers", "2", "--stream-idle-timeout-s", "nan"], "nan"),
        (["serve", "--num-workers", "2", "--max-model-bytes", "-1"], "-1"),
        (["serve", "--num-workers", "2", "--nonsense"], "--nonsense"),
        (["status"], "ADDRESS"),
        (["status", "127.0.0.1:1", "--timeout-s", "0"], "--timeout-s"),
    ],
)
def test_wrong_arguments_are_named_after_the_usage(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: ps-server")
    assert named in printed.err.splitlines()[-1]


def test_no_arguments_give_the_usage_as_a_process_too() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "ps_server"], capture_output=True, text=True, timeout=20, check=False
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("usage: ps-server")
    assert "Traceback" not in process.stderr


# test_slow_links.py checks how long a peer may be silent; these tests check that the limit has an effect.
IMPATIENT = {"grpc.keepalive_timeout_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}


class Impatient(ParameterServerSession):
    """A session that takes a server for gone after a second of silence."""

    _timing = Timing(peer_silence_s=1.0)


def test_a_server_that_no_longer_answers_is_noticed_by_a_worker_at_the_barrier() -> None:
    with (
        ServerProcess(num_workers=2) as server,
        Impatient([server.address], worker_id="chief", is_chief=True, reconnect_timeout_s=0) as session,
    ):
        session.initialize(CENTER)
        with ThreadPoolExecutor(1) as pool, RawClient(server.address) as client:
            push = pool.submit(session.push_and_average, of(1))
            until(lambda: client.worker("chief").waiting, "the push waits")
            server.signal(signal.SIGSTOP)
            with pytest.raises(ServerUnavailableError, match="is gone"):
                push.result(timeout=20)


def test_a_worker_that_no_longer_answers_frees_its_id(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ps_server.server, "_OPTIONS", [*{**dict(ps_server.server._OPTIONS), **IMPATIENT}.items()])
    script = (
        "import sys, numpy as np; from ma_client import ParameterServerSession as S\n"
        "s = S([sys.argv[1]], worker_id='b'); c, _ = s.pull(); s.push_and_average(c)"
    )
    server = start_server(2)
    with worker(server.address, "chief") as session:
        session.initialize(CENTER)
        with (
            subprocess.Popen([sys.executable, "-c", script, server.address]) as frozen,
            RawClient(server.address) as client,
        ):
            until(lambda: any(w.worker_id == "b" and w.waiting for w in client.status().workers), "b waits")
            frozen.send_signal(signal.SIGSTOP)
            try:
                with worker(server.address, "b", reconnect_timeout_s=0) as again:
                    again.pull()
                    until(lambda: is_free(again), "its id is free")
            finally:
                frozen.kill()


def is_free(session: ParameterServerSession) -> bool:
    """Whether a push under this id is admitted; an admitted one times out, since no other worker pushes."""
    try:
        session.push_and_average(of(2), timeout_s=0.3)
    except ConflictError as error:
        if error.reason is not Reason.WORKER_ID_IN_USE:
            raise
        return False
    except DeadlineExceededError:
        return True
    raise AssertionError("the round committed")
