"""Plays with a keeper of checkpoints, whose writers may be stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ps_server.checkpoints.keeper import CheckpointPolicy, Keeper
from tests.checkpoints import opened_keeper

__all__ = ["play", "said", "soon", "state_of", "stopped"]


def play(body: Callable[[Keeper], Any], policy: CheckpointPolicy) -> None:
    """Runs a coroutine with a keeper."""

    async def run() -> None:
        with opened_keeper(policy) as keeper:
            await asyncio.wait_for(body(keeper), 60)

    asyncio.run(run())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The events, in order."""
    return [record.modelaverage_event for record in caplog.records]  # type: ignore[attr-defined]


async def soon(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Stops the writers during the context, as if the disk held them."""
    assert processes
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def state_of(process: int) -> str:
    """The state of the process as a letter; empty if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except FileNotFoundError:
        return ""
