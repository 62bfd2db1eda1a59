"""Jobs that hostile input must not change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_input.guarded import Job, running
from tests.conftest import StartServer


@pytest.fixture
def bare(start_server: StartServer) -> Iterator[Job]:
    """No center yet."""
    with running(start_server) as job:
        yield job


@pytest.fixture
def job(bare: Job) -> Job:
    bare.initialize()
    return bare


@pytest.fixture
def impatient(start_server: StartServer) -> Iterator[Job]:
    """No center yet, and streams that stall are lost after 1 s."""
    with running(start_server, stall_timeout_s=1.0) as job:
        yield job
