"""The page of a real server: what browsers get, live, and what hangs nothing up."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.page.app import SECURITY_HEADERS
from ps_server.rules.policy import RoundPolicy
from tests.conftest import RunningServer, StartServer
from tests.jobs import STEP, Job, of
from tests.page.conftest import PAGE, a_round
from tests.page.described import check_document
from tests.page.reading import ask, document, place_of, stream
from tests.raw_client import RawClient, until


def rounds(server: RunningServer) -> Any:
    return document(server.page_url, "/api/rounds")


def marks(server: RunningServer) -> list[tuple[str, str | None]]:
    return [(mark["kind"], mark["worker_id"]) for mark in rounds(server)["marks"]]


def shown(server: RunningServer, kind: str, worker_id: str | None = None) -> None:
    until(lambda: (kind, worker_id) in marks(server), f"{kind} of {worker_id} is marked")


def leave(job: Job, worker_id: str, incarnation: bytes = b"0123456789abcdef", finished: bool = False) -> None:
    stream = job.client.open_leave()
    stream.send(pb.LeaveRequest(worker_id=worker_id, incarnation=incarnation, finished=finished))
    stream.half_close()
    stream.receive()


def test_the_status_of_the_page_is_the_servers_and_changes_with_a_round(server: RunningServer, job: Job) -> None:
    before = document(server.page_url, "/api/status")
    check_document("Status", before)
    assert before["server"]["address"] == server.address
    assert before["server"]["first_step"] == STEP
    a_round(job, loss=0.5)
    until(lambda: document(server.page_url, "/api/status")["status"]["global_step"] == STEP + 1, "the step is shown")
    after = document(server.page_url, "/api/status")
    assert after["status"]["rounds_committed"] == 1
    status = job.client.status()
    moved = {"messages": status.received_bytes + status.sent_bytes, "data_connection": 0, "shared_memory": 0}
    assert after["traffic"]["by_transport"] == moved
    assert status.received_bytes > 0
    found = rounds(server)
    check_document("Rounds", found)
    (one,) = found["rounds"]
    assert (one["step"], one["loss"], one["waiting_s"] > 0) == (STEP, 0.5, True)
    assert [(worker["worker_id"], worker["local_step"]) for worker in one["workers"]] == [
        ("a", 10 * STEP),
        ("b", 10 * STEP),
    ]
    assert 0 == one["workers"][0]["pushed_s"] <= one["workers"][0]["whole_s"] <= one["took_s"]
    assert one["took_s"] == pytest.approx(one["waiting_s"] + one["receiving_s"] + one["averaging_s"], rel=1e-6)


def test_a_stream_has_everything_at_once_and_then_only_what_is_new(server: RunningServer, job: Job) -> None:
    a_round(job, STEP)
    with stream(server.page_url) as page:
        status, news = page.pair()
        check_document("Status", status)
        check_document("Rounds", news)
        assert news["whole"]
        assert [each["step"] for each in news["rounds"]] == [STEP]
        a_round(job, STEP + 1)
        seen = list[int]()
        while not seen:
            status, news = page.pair()
            assert not news["whole"]
            seen = [each["step"] for each in news["rounds"]]
        assert seen == [STEP + 1]
        assert (news["next_step"], status["status"]["global_step"]) == (STEP + 2, STEP + 2)


def test_the_page_names_whom_the_round_waits_for(server: RunningServer, job: Job) -> None:
    a_round(job, STEP)
    with stream(server.page_url) as page:
        one = job.push("a", of(1), push_id=STEP + 1, base_step=STEP + 1)
        waiting = list[Any]()
        while not waiting:
            waiting = page.pair()[0]["waiting"]
        assert [(each["worker_id"], each["is_late"]) for each in waiting] == [("b", False)]
        assert 0 <= waiting[0]["for_s"] < 5
        job.push("b", of(1), push_id=STEP + 1, base_step=STEP + 1).answer()
        one.answer()
        while page.pair()[0]["waiting"]:
            pass


def test_a_round_without_a_worker_names_it(start_server: StartServer) -> None:
    server = start_server(RoundPolicy(2, 1, 2, grace_s=2.0), page=PAGE)
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        a_round(job, STEP)
        job.push("a", of(1), push_id=STEP + 1, base_step=STEP + 1).answer()
        late = job.push("b", of(1), push_id=STEP + 1, base_step=STEP)
        assert late.answer()[0].outcome == pb.OUTCOME_STALE
    assert [each["without"] for each in rounds(server)["rounds"]] == [[], ["b"]]
    shown(server, "stale", "b")


def test_what_happens_to_workers_is_marked(server: RunningServer, job: Job) -> None:
    a_round(job, STEP)
    other = job.push("a", of(1), push_id=1, base_step=STEP + 1, incarnation=b"another process!")
    job.push("b", of(1), push_id=STEP + 1, base_step=STEP + 1).answer()
    other.answer()
    shown(server, "restarted", "a")
    leave(job, "a", b"another process!")
    shown(server, "left", "a")
    leave(job, "b", finished=True)
    shown(server, "finished", "b")


def test_checkpoints_are_marked_and_a_restored_server_says_so(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(2, page=PAGE, checkpoints=CheckpointPolicy(tmp_path))
    with RawClient(server.address) as client:
        a_round(Job(client, server.address), STEP)
    shown(server, "checkpoint")
    server.stop()
    again = start_server(2, page=PAGE, checkpoints=CheckpointPolicy(tmp_path))
    found = document(again.page_url, "/api/status")["server"]
    assert (found["restored"], found["first_step"]) == (True, STEP + 1)
    assert marks(again)[0] == ("restored", None)
    assert rounds(again)["first_step"] == STEP + 1


def test_a_name_that_is_a_script_comes_out_as_json_only(server: RunningServer, job: Job) -> None:
    name = "<script>alert(1)</script>"
    a_round(job, names=(name, "b"))
    leave(job, name)
    for path in ("/", "/api", "/api/rounds.csv", "/api/openapi.json"):
        assert b"alert" not in ask(server.page_url, path).body
    for path in ("/api/status", "/api/rounds"):
        answer = ask(server.page_url, path)
        assert name.encode() in answer.body
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/status", "/api/rounds", "/api/rounds.csv", "/api/openapi.json", "/x"]
)
def test_every_answer_protects_itself(server: RunningServer, path: str) -> None:
    answer = ask(server.page_url, path)
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name.lower()] == value
    if path.startswith("/api"):
        assert answer.headers["cache-control"] == "no-store"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/api/stream", "/%61pi/stream", "/api/%73tatus", "/static/main.js"])
def test_another_site_is_refused_however_the_path_is_written(server: RunningServer, path: str) -> None:
    assert ask(server.page_url, path, {"Sec-Fetch-Site": "cross-site"}).status == 403
    assert ask(server.page_url, "/", {"Sec-Fetch-Site": "cross-site"}).status == 200


@pytest.mark.parametrize(
    "request_", [b"<script>alert(1)</script>\r\n\r\n", b"GET /" + b"a" * 9000, b"GET / HTTP/1.1\r\n<b>: x\r\n\r\n"]
)
def test_what_is_no_request_is_answered_like_everything_else_and_not_repeated(
    server: RunningServer, request_: bytes
) -> None:
    with socket.create_connection(place_of(server.page_url), timeout=10) as client:
        client.sendall(request_)
        answer = HTTPResponse(client)
        answer.begin()
        assert answer.status == 400
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers[name] == value
        check_document("Error", json.loads(answer.read()))


@pytest.mark.parametrize(
    "path", ["/x", "/static/", "/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "//", "/api/"]
)
def test_nothing_else_is_served(server: RunningServer, path: str) -> None:
    answer = ask(server.page_url, path)
    assert answer.status == 404
    assert set(answer.json) == {"error", "hint"}
    check_document("Error", answer.json)


@pytest.mark.parametrize("since", ["", "-1", "1.5", "x", "9" * 19, "9" * 5000, "٣", "0x10"])
def test_since_is_a_step(server: RunningServer, since: str) -> None:
    answer = ask(server.page_url, f"/api/rounds?{urlencode({'since': since})}")
    assert answer.status == 400
    check_document("Error", answer.json)


def test_methods_bodies_and_hosts_are_checked_before_anything_else(server: RunningServer) -> None:
    assert ask(server.page_url, method="POST").status == 405
    assert ask(server.page_url, method="HEAD").status == 405
    assert ask(server.page_url, method="POST").headers["allow"] == "GET"
    assert ask(server.page_url, body=b"x").status == 400
    answer = ask(server.page_url, "/api/status", {"Host": "evil.example"})
    assert answer.status == 421
    check_document("Error", answer.json)


@pytest.mark.parametrize(("shared", "way"), [(True, "shared_memory"), (False, "data_connection")])
def test_bytes_are_counted_by_the_way_they_take(start_server: StartServer, shared: bool, way: str) -> None:
    values = {"x": np.zeros(1 << 19, np.float32)}  # 2 MiB: worth a data connection
    server = start_server(1, page=PAGE, shared=shared)
    with ParameterServerSession([server.address], worker_id="a", is_chief=True, shared_memory=shared) as session:
        session.initialize(values)
        session.pull()
        until(lambda: _bytes_after_push(session, values, server)[way] > 0, f"{way} is used")
        found = _bytes_after_push(session, values, server)
        status = session.status()
    assert sum(found.values()) == status.received_bytes + status.sent_bytes
    assert found["shared_memory"] == status.shared_bytes
    assert found["messages"] >= values["x"].nbytes  # the initial values


def _bytes_after_push(
    session: ParameterServerSession, values: dict[str, np.ndarray[Any, Any]], server: RunningServer
) -> dict[str, int]:
    step = session.push_and_average(values).global_step
    found: dict[str, Any] = {}
    while not found or found["status"]["global_step"] < step:
        found = document(server.page_url, "/api/status")
    by_transport: dict[str, int] = found["traffic"]["by_transport"]
    return by_transport


def test_the_log_is_on_the_page(start_server: StartServer) -> None:
    server = start_server(2, page=PAGE)
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        a_round(job)
        leave(job, "a")
    until(lambda: _texts(server) != [], "the line has come")
    (event,) = document(server.page_url, "/api/status")["events"]
    assert (event["level"], event["name"]) == ("warning", "worker_left")
    assert event["text"] == "'a' has left without having finished; rounds wait for it"


def _texts(server: RunningServer) -> list[str]:
    return [event["text"] for event in document(server.page_url, "/api/status")["events"]]
