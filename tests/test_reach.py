"""Servers that were away: found again at a new address; pulls that resume after a break, or wait for the chief."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession
from ma_client.transports.grpc_calls import GrpcCalls
from ma_client.transports.reach import Reach
from ma_client.transports.timing import Timing
from modelaverage.conformance.scripted import Refusal, ScriptedServer, center
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.raw_client import until

BROKEN = Refusal("UNAVAILABLE", None, "the connection broke")
ARRAYS = {"w": np.arange(64, dtype=np.float32)}  # four fragments of 64 bytes
OTHER = {"w": np.arange(64, dtype=np.float32) + 100}


class Server(ScriptedServer):
    """Records what pulls ask for."""

    def __init__(self) -> None:
        self.asked: list[pb.PullRequest] = []
        self.uptime_s = 1000.0
        self.on_initialize = list[Callable[[], None]]()
        super().__init__()

    def Pull(self, request: pb.PullRequest, context: Any) -> Iterator[pb.PullResponse]:  # noqa: N802
        self.asked.append(request)
        return super().Pull(request, context)

    def Initialize(self, requests: Any, context: Any) -> pb.InitializeResponse:  # noqa: N802
        if self.on_initialize:
            self.on_initialize.pop()()
        return super().Initialize(requests, context)

    def GetStatus(self, _: pb.GetStatusRequest, __: Any) -> pb.GetStatusResponse:  # noqa: N802
        return pb.GetStatusResponse(uptime_s=self.uptime_s, global_step=7)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.end()


def pulled(server: Server, *scripts: list[pb.PullResponse | Refusal]) -> np.ndarray[Any, Any]:
    for script in scripts:
        server.pulls.put(script)
    with ParameterServerSession([server.address], worker_id="a") as session:
        values: np.ndarray[Any, Any] = session.pull(timeout_s=20)[0]["w"]
    return values


def test_a_pull_that_broke_goes_on_where_it_broke(server: Server) -> None:
    header, *fragments = center(ARRAYS)
    values = pulled(
        server,
        [header, *fragments[:2], BROKEN],
        [header, fragments[2], BROKEN],
        [header, BROKEN],
        [header, fragments[3]],
    )
    assert (values == ARRAYS["w"]).all()
    asked = [(request.first_fragment, request.continued_step) for request in server.asked]
    assert asked == [(0, 0), (2, 7), (3, 7), (3, 7)]


def test_a_pull_that_broke_starts_over_when_another_round_has_committed(server: Server) -> None:
    header, *fragments = center(ARRAYS)
    assert (pulled(server, [header, *fragments[:3], BROKEN], list(center(OTHER, global_step=8))) == OTHER["w"]).all()


def test_a_pull_that_broke_starts_over_at_a_server_that_does_not_know_how_to_go_on(server: Server) -> None:
    header, *fragments = center(ARRAYS)
    assert (pulled(server, [header, *fragments[:3], BROKEN], [header, *fragments]) == ARRAYS["w"]).all()


def test_a_pull_that_broke_starts_over_at_another_process_of_the_server(server: Server) -> None:
    header, *fragments = center(ARRAYS)
    server.uptime_s = 0.0  # it began after the pull: its center of this step may be another one
    assert (pulled(server, [header, *fragments[:3], BROKEN], list(center(OTHER))) == OTHER["w"]).all()
    assert [request.first_fragment for request in server.asked] == [0, 0]


def test_a_pull_does_not_continue_what_another_pull_left_behind(server: Server) -> None:
    header, *fragments = center(ARRAYS)
    with ParameterServerSession([server.address], worker_id="a", reconnect_timeout_s=20) as session:
        server.pulls.put([header, *fragments[:2], Refusal("PERMISSION_DENIED")])
        with pytest.raises(Exception, match="as the script wants it"):
            session.pull(timeout_s=20)
        server.pulls.put([BROKEN])
        server.pulls.put(list(center(OTHER)))
        assert (session.pull(timeout_s=20)[0]["w"] == OTHER["w"]).all()
    assert [request.first_fragment for request in server.asked] == [0, 0, 0]


def waiting(waited_s: float) -> pb.PullResponse:
    return pb.PullResponse(waiting=pb.ChiefNotice(waited_s=waited_s))


def test_a_pull_that_waits_for_the_chief_says_so_after_5_s_and_at_growing_gaps(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ma_client")
    notices = [waiting(waited_s) for waited_s in range(0, 61, 5)]
    assert (pulled(server, [*notices, *center(ARRAYS)]) == ARRAYS["w"]).all()
    assert all(request.accepts_notices for request in server.asked)
    where = f"waits for the chief to initialize the center at {server.address}: "
    assert caplog.messages == [f"{where}{waited_s} s" for waited_s in (5, 15, 35)]


def test_a_pull_that_waits_for_nobody_wants_no_notices(server: Server) -> None:
    server.pulls.put(list(center(ARRAYS)))
    with ParameterServerSession([server.address], worker_id="a") as session:
        session.pull(wait_initialized=False, timeout_s=20)
    assert not server.asked[0].accepts_notices


# Attempts to connect.


def test_attempts_that_get_no_answer_are_made_longer_until_the_server_answers() -> None:
    reach = Reach("127.0.0.1:1")
    first_s = reach.attempt_s
    assert not reach.failed(0.1)  # refused: it was heard at once
    assert reach.failed(first_s)
    assert reach.attempt_s == 2 * first_s
    while reach.failed(reach.attempt_s):
        pass
    assert 30 < reach.attempt_s < 120
    reach.answered()
    assert reach.attempt_s == first_s


HURRIED = Timing(lasting_s=0.01, reach_interval_s=0.01)


@pytest.mark.parametrize("answers", [True, False])
def test_a_call_to_a_server_that_is_there_again_is_made_another_way(answers: bool) -> None:
    looks = threading.Semaphore(0)

    def look(_: object) -> bool:
        looks.release()
        return answers

    reach, another_way = Reach("127.0.0.1:1", HURRIED, look), threading.Event()
    reach.failed(0.0)
    with reach.looking(another_way.set, lambda: False):
        assert looks.acquire(timeout=10)
        if answers:
            assert another_way.wait(10)
        else:
            assert looks.acquire(timeout=10)  # it looks again
    assert another_way.is_set() is answers


def test_a_call_that_is_connected_is_left_alone_however_long_it_takes() -> None:
    another_way = threading.Event()
    reach = Reach("127.0.0.1:1", HURRIED, lambda _: True)
    reach.failed(0.0)
    with reach.looking(another_way.set, lambda: True):
        assert not another_way.wait(0.2)


def calls_of(session: ParameterServerSession) -> GrpcCalls:
    calls = next(iter(session._servers)).connection.calls
    assert isinstance(calls, GrpcCalls)
    return calls


def test_a_session_knows_whether_it_is_connected(server: Server) -> None:
    with ParameterServerSession([server.address], worker_id="a") as session:
        calls = calls_of(session)
        assert calls.is_connected
        server.end()
        until(lambda: not calls.is_connected, "it is not any more")


def test_an_initialization_that_is_given_up_for_another_way_is_made_again(server: Server) -> None:
    with ParameterServerSession([server.address], worker_id="a", is_chief=True) as session:
        server.on_initialize.append(calls_of(session).go_another_way)
        server.initializations.put(None)
        server.initializations.put(None)
        assert session.initialize(ARRAYS, timeout_s=20).initialized


# Runs in a separate namespace, in which it may change names and addresses.
MOVING = """
import os, signal, subprocess, sys, tempfile, threading, time
import numpy as np
from ma_client import ParameterServerSession
where = tempfile.mkdtemp()
names = os.path.join(where, "hosts")
def name(address):
    with open(names, "w") as file:
        file.write(address + " ps\\n")
def serve(address):
    command = [sys.executable, "-m", "ps_server", "serve", "--bind", address + ":2222", "--num-workers", "1",
               "--insecure", "--checkpoint-dir", where + "/center"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "listening" in server.stdout.readline()
    return server
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
name("127.0.0.2")
subprocess.run(["mount", "--bind", names, "/etc/hosts"], check=True)
server, back_at_s = serve("127.0.0.2"), 0.0
def move():
    global server, back_at_s
    time.sleep(3)  # it is away for as long as a pod takes
    server = serve("127.0.0.3")
    name("127.0.0.3")
    back_at_s = time.monotonic()
model = {"w": np.zeros(400_000, np.float32)}
with ParameterServerSession(["ps:2222"], worker_id="a", is_chief=True, shared_memory=False) as session:
    session.initialize(model)
    beside = 0
    while beside != 4:  # on a data connection
        session.push_and_average(model)
        beside = session.status().workers[0].transport
    server.kill()
    server.wait()
    mover = threading.Thread(target=move)
    mover.start()
    session.push_and_average(model)
    print(time.monotonic() - back_at_s)
    mover.join()
    for _ in range(100):
        session.push_and_average(model)
        if session.status().workers[0].transport == 4:
            print("beside")
            break
        time.sleep(0.05)
server.kill()
"""


def test_a_server_that_comes_back_under_a_new_address_is_found_within_5_s() -> None:
    unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
    if os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run([*unshare, "ip", "link"]).returncode:
        pytest.skip("needs root, unshare and ip")
    done = subprocess.run([*unshare, sys.executable, "-c", MOVING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found_after_s, beside = done.stdout.split()
    assert float(found_after_s) < 5
    assert beside == "beside", "data connections follow"
