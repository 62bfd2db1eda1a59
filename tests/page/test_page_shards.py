"""A page that shows the job's other servers beside its own."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.status import NoAnswerError, Seen
from ps_server.edge.security import ServerSecurity
from ps_server.page import shards
from ps_server.page.shards import OtherShards
from ps_server.unusable import UnusableSettingError
from tests.certificates import Authority
from tests.conftest import StartServer
from tests.jobs import STEP, Job
from tests.launched import Launched
from tests.page.conftest import PAGE
from tests.page.described import check_document
from tests.page.reading import document
from tests.raw_client import RawClient, until

TOKEN = "0123456789abcdef" * 2


def shards_of(url: str) -> list[Any]:
    found = document(url, "/api/status")
    check_document("Status", found)
    return list(found["shards"])


def test_all_servers_are_there_with_what_they_do(start_server: StartServer) -> None:
    other = start_server(2)
    page = start_server(2, page=replace(PAGE, shards=(other.address,)))
    with RawClient(other.address) as client:
        Job(client, other.address)
        until(lambda: (shards_of(page.page_url)[1]["status"] or {}).get("global_step") == STEP, "it is asked")
    own, beside = shards_of(page.page_url)
    assert (own["address"], own["problem"], own["status"]["phase"]) == (page.address, "", "PHASE_UNINITIALIZED")
    assert (beside["address"], beside["problem"], beside["status"]["phase"]) == (other.address, "", "PHASE_IDLE")
    assert "workers" not in own["status"].keys() | beside["status"].keys()


def test_each_other_server_is_shown_once_and_the_pages_own_not_again(start_server: StartServer, tmp_path: Path) -> None:
    own, other = f"unix:{tmp_path}/own", start_server(2).address
    serve = ["serve", "--num-workers", "2", "--bind", own, "--page-bind", "127.0.0.1:0"]
    for address in (other, own, other):
        serve += ["--page-shard", address]
    with Launched(["-m", "ps_server", *serve]) as page:
        page.wait_for("ps-server: page at ")
        url = page.lines[-1].split()[-1]
        assert [shard["address"] for shard in shards_of(url)] == [own, other]


def test_a_server_alone_has_no_table_of_shards(start_server: StartServer) -> None:
    assert shards_of(start_server(2, page=PAGE).page_url) == []


def test_a_server_that_is_away_is_named_with_what_was_last_known_and_the_page_goes_on(
    start_server: StartServer,
) -> None:
    other = start_server(2)
    page = start_server(2, page=replace(PAGE, shards=(other.address,)))
    until(lambda: shards_of(page.page_url)[1]["status"] is not None, "it answers")
    other.stop()
    until(lambda: shards_of(page.page_url)[1]["away_s"] > 0.1, "it is away")
    (_, away) = shards_of(page.page_url)
    assert other.address in away["problem"]
    assert away["status"]["num_workers"] == 2


def test_other_servers_are_asked_with_the_servers_certificate_and_token(
    start_server: StartServer, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    own = authority.sign("server")
    (tmp_path / "token").write_text(TOKEN)
    security = ServerSecurity(own.cert, own.key, authority.ca, tmp_path / "token")
    other = start_server(1, security=security)
    plain = replace(security, tls_client_ca=None)  # for the browser
    page = start_server(1, security=plain, page=replace(PAGE, shards=(other.address,), shard_ca=authority.ca))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    tls = ssl.create_default_context(cafile=authority.ca)
    until(lambda: document(page.page_url, "/api/status", headers, tls)["shards"][1]["status"], "it answers")


def test_a_server_that_refuses_the_page_is_told_with_the_pages_own_flags(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    other = start_server(1, security=ServerSecurity(token_file=tmp_path / "token"))
    page = start_server(1, page=replace(PAGE, shards=(other.address,)))
    until(lambda: shards_of(page.page_url)[1]["problem"].endswith(" and --token-file"), "it is refused")
    assert "carries no token" in shards_of(page.page_url)[1]["problem"]


def test_an_address_that_is_none_is_refused_by_name(start_server: StartServer) -> None:
    with pytest.raises(UnusableSettingError, match=r"--page-shard: .*'nowhere'"):
        start_server(1, page=replace(PAGE, shards=("nowhere",)))


def seen(others: OtherShards) -> tuple[Seen, ...]:
    return asyncio.run(others.seen())


def test_who_looks_gets_present_answers_at_once() -> None:
    steps = iter(range(9))
    others = OtherShards(("a",), lambda _: pb.GetStatusResponse(global_step=next(steps)))
    for step in range(3):
        (found,) = seen(others)
        assert found.status is not None
        assert found.status.global_step == step


def test_what_was_heard_before_a_pause_is_not_told_as_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OLD_FROM_S", 0.2)
    hangs, ends = Event(), Event()

    def fetch(_: str) -> pb.GetStatusResponse:
        if hangs.is_set():
            ends.wait(10.0)
            raise NoAnswerError("a is away")
        return pb.GetStatusResponse(global_step=3)

    others = OtherShards(("a",), fetch)
    assert seen(others)[0].status is not None
    hangs.set()
    time.sleep(0.3)
    began_s = time.monotonic()
    (found,) = seen(others)
    assert time.monotonic() - began_s < 1.0
    assert (found.status, found.problem) == (None, "")
    ends.set()
    until(lambda: seen(others)[0].problem == "a is away", "it has no answer")
    (found,) = seen(others)
    assert found.status is not None
    assert found.away_s < time.monotonic() - began_s + 0.1


def test_a_server_that_never_answers_holds_up_nobody() -> None:
    ends = Event()

    def fetch(address: str) -> pb.GetStatusResponse:
        if address == "b":
            return pb.GetStatusResponse(global_step=3)
        ends.wait(10.0)
        raise NoAnswerError("a is away")

    others, began_s = OtherShards(("a", "b"), fetch), time.monotonic()
    (a, b) = seen(others)
    assert time.monotonic() - began_s < 1.0
    assert (a.status, a.problem) == (None, "")
    assert b.status is not None
    assert b.status.global_step == 3
    ends.set()
    until(lambda: [each.problem for each in seen(others)] == ["a is away", ""], "both were asked")
