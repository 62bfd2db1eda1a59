"""What `bench.versions` compares: rounds of two checkouts, each with its own code, in processes that it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.versions import interval_of_median, main
from tests.source_tree import ROOT

ONE_ROW = ("--transport", "tcp", "--parameters", "1000")
# Without a server: the mean of the workers' values, but for one element.
WRONG_SESSION = """
from contextlib import nullcontext
from types import SimpleNamespace


class Session:
    def __init__(self, ps_hosts, *, worker_id, is_chief, shared_memory):
        self.to_mean = 0.5 if is_chief else -0.5

    def initialize(self, values):
        pass

    def pull(self, copy):
        pass

    def push_and_average(self, values, copy):
        center = values["x"] + self.to_mean
        center[-1] += self.to_mean > 0
        return SimpleNamespace(center={"x": center})


def ParameterServerSession(*args, **kwargs):
    return nullcontext(Session(*args, **kwargs))
"""

# Says that it has started, and waits for its end.
WAITING = """
import sys

sys.stderr.write("started\\n")  # in one write, as two processes share the pipe
sys.stderr.flush()
sys.stdin.read()
"""


def checkout_with(folder: Path, module: str, code: str) -> Path:
    """A checkout of this version but for one package, which has this code."""
    for package in {"proto", "ps_server", "ma_client"} - {Path(module).parts[0]}:
        (folder / package).symlink_to(ROOT / package)
    (folder / module).parent.mkdir()
    (folder / module).write_text(code)
    return folder


def test_a_checkout_is_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "made" / "results.json"
    assert main([str(ROOT), *ONE_ROW, "--starts", "1", "--rounds", "3", "--json", str(results)]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    [result] = json.loads(results.read_text())
    assert [cell.strip() for cell in rows[0]] == [
        "tcp",
        "1,000",
        f"{result['other_ms']:.2f}",
        f"{result['here_ms']:.2f}",
        f"{result['ratio']:.3f}",
        f"{result['paired_low']:.3f} to {result['paired_high']:.3f}",
    ]
    assert result["ratio"] == result["here_ms"] / result["other_ms"] > 0


@pytest.mark.parametrize(
    ("module", "code", "told"),
    [
        ("ps_server/__main__.py", "raise SystemExit('other code')", ["other code", "a server has ended before"]),
        ("ma_client/__init__.py", "raise SystemExit('other code')", ["other code", "a worker has ended"]),
        ("ma_client/__init__.py", WRONG_SESSION, ["worker-0 finds 1 wrong elements in the center"]),
    ],
    ids=["server", "worker", "center"],
)
def test_the_other_version_runs_its_own_code_and_is_named_if_it_fails(
    module: str, code: str, told: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = checkout_with(tmp_path, module, code)
    assert main([str(other), *ONE_ROW, "--json", str(tmp_path / "results.json")]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert set(lines[:-1]) == set(told[:-1])
    assert lines[-1].startswith(f"bench.versions: {other}: {told[-1]}")


def test_a_path_that_is_no_checkout_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"bench.versions: {tmp_path} is no checkout of this repository")
    assert "git worktree add" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_tool_ends_every_process_quietly(number: signal.Signals, tmp_path: Path) -> None:
    other = checkout_with(tmp_path, "ma_client/__init__.py", WAITING)
    with subprocess.Popen(
        [sys.executable, "-m", "bench.versions", str(other), *ONE_ROW, "--json", str(tmp_path / "results.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'proto'}{os.pathsep}{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as tool:
        assert tool.stderr is not None
        assert tool.stderr.readline() == "started\n"
        tool.send_signal(number)
        assert tool.communicate(timeout=20)[1] in ("", "started\n")
    assert tool.returncode == 128 + signal.SIGINT
    with pytest.raises(ProcessLookupError):
        os.killpg(tool.pid, 0)


def test_the_interval_holds_the_median_and_knows_that_values_of_one_start_resemble_each_other() -> None:
    alike = [[0.9, 1.0, 1.1]] * 5
    low, high = interval_of_median(alike)
    assert 0.9 <= low <= 1.0 <= high <= 1.1
    assert interval_of_median([[0.8] * 20, [1.0] * 20, [1.2] * 20]) == (0.8, 1.2)
