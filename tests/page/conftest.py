"""Servers with a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ps_server.page.connections import Connections
from ps_server.page.thread import PageConfig
from tests.conftest import RunningServer, StartServer
from tests.jobs import COUNT, STEP, Job, of
from tests.raw_client import RawClient

PAGE = PageConfig("127.0.0.1:0", interval_s=0.05)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Connections]:
    """The connections of each page that starts."""
    found, begin = list[Connections](), Connections.__init__

    def noted(connections: Connections, *arguments: Any) -> None:
        found.append(connections)
        begin(connections, *arguments)

    monkeypatch.setattr(Connections, "__init__", noted)
    return found


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    """A server for two workers, with a page that may change twenty times a second."""
    return start_server(2, page=PAGE)


@pytest.fixture
def job(server: RunningServer) -> Iterator[Job]:
    """A job on it, with a center at STEP."""
    with RawClient(server.address) as client:
        yield Job(client, server.address)


def a_round(job: Job, step: int = STEP, names: tuple[str, str] = ("a", "b"), **fields: float) -> None:
    """A round of two workers."""
    one = job.push(names[0], of(1), push_id=step, base_step=step, local_step=10 * step, **fields)
    job.given(names[0], COUNT)
    other = job.push(names[1], of(2), push_id=step, base_step=step, local_step=10 * step, **fields)
    one.answer()
    other.answer()
