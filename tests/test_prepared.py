"""Processes that tests fork from a prepared one: they run, end and are killed as fresh ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.prepared import Prepared


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "echoing.py").write_text(
        "import os, sys\n"
        "print(__name__, *sys.argv[1:], os.environ['FLAVOR'], os.getcwd() == sys.argv[1], flush=True)\n"
        "line = sys.stdin.readline()\n"
        "print(line.strip(), file=sys.stderr, flush=True)\n"
        "sys.exit(int(line or 0))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAVOR", "of the test")
    return "echoing"


def test_a_process_has_its_arguments_environment_and_directory_and_ends_with_its_code(
    module: str, tmp_path: Path
) -> None:
    process = Prepared(module, str(tmp_path), pipes=True)
    assert process.stdout.readline() == f"__main__ {tmp_path} of the test True\n"
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.write("7\n")
    process.stdin.flush()
    assert process.communicate(timeout_s=20) == ("", "7\n")
    assert process.wait() == process.returncode == 7


def test_a_process_that_is_killed_ends_with_its_signal_and_a_late_signal_strikes_nobody(
    module: str, tmp_path: Path
) -> None:
    process = Prepared(module, str(tmp_path), pipes=True)
    assert process.stdout.readline()
    process.kill()
    assert process.wait(timeout_s=20) == -signal.SIGKILL
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_wait_for_a_process_is_bounded(module: str, tmp_path: Path) -> None:
    process = Prepared(module, str(tmp_path), pipes=True)
    with pytest.raises(TimeoutError, match=f"process {process.pid} has not ended"):
        process.wait(timeout_s=0.01)
    process.communicate(timeout_s=20)


def test_two_processes_have_no_descriptor_of_each_other(module: str, tmp_path: Path) -> None:
    first, second = (Prepared(module, str(tmp_path), pipes=True) for _ in range(2))
    assert first.stdout.readline()
    assert second.stdout.readline()
    descriptors = os.listdir(f"/proc/{second.pid}/fd")
    assert len(descriptors) <= 4, descriptors
    for process in (first, second):
        process.communicate(timeout_s=20)
