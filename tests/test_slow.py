"""A line for a person who waits: only when something takes long, once, and never from a worker of a launcher."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelaverage.commands import slow
from modelaverage.commands.slow import says_if_slow
from ps_server.__main__ import main as ps_server_main
from ps_worker.__main__ import main as ps_worker_main
from ps_worker.commands.stop_signals import STOP_SIGNALS

SOON_S = 0.02


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(slow, "SLOW_AFTER_S", SOON_S)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_takes_long_is_said_once_with_its_time() -> None:
    said = queue.SimpleQueue[str]()
    with says_if_slow(said.put, "waits"):
        assert said.get(timeout=20) == "waits (0.02 s so far)"
    assert said.empty()


def test_what_is_soon_over_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "SLOW_AFTER_S", 600.0)
    said: list[str] = []
    with says_if_slow(said.append, "waits"):
        pass
    assert said == []


def test_what_is_no_longer_needed_is_not_said() -> None:
    said, asked = list[str](), queue.SimpleQueue[bool]()

    def is_needed() -> bool:
        asked.put(True)
        return False

    with says_if_slow(said.append, "waits", is_needed):
        assert asked.get(timeout=20)
    assert said == []


def test_an_export_that_waits_for_its_server_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ps_server_main(["export", "127.0.0.1:1", str(tmp_path / "center"), "--timeout-s", "0.5"]) == 1
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "ps-server: reads the center from 127.0.0.1:1 (0.02 s so far)"


def test_a_worker_that_waits_for_its_server_says_so_unless_its_lines_are_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["digits", "--ps-hosts", "127.0.0.1:1", "--num-workers", "1", "--task-index"]
    line = "ps-worker: waits for the parameter server"
    for index, waits in (("0", f"{line} at 127.0.0.1:1"), ("auto", f"{line} to assign a task index")):
        assert ps_worker_main([*command, index, "--connect-timeout-s", "0.5"]) == 1
        assert f"{waits} (0.02 s so far)" in capsys.readouterr().err
        assert ps_worker_main([*command, index, "--connect-timeout-s", "0.2", "--log-json"]) == 1
        assert "so far" not in capsys.readouterr().err
