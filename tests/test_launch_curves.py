"""A run of ma-launch ends with the curves of the loss that its workers have reported."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from ma_client.files.round_log import ROUND_LOG, LoggedRound
from tests.launched import Launched, said

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")

# Makes 6 rounds, reporting a loss; worker 1 kills itself after as many rounds as it is told.
TRAINING = """
import os, signal, sys
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
index, last = ClusterSpec.from_env().task_index, int(sys.argv[1])
with ParameterServerSession.from_env() as session:
    if session.is_chief:
        session.initialize({"w": np.zeros(3, np.float32)})
    session.pull()
    for step in range(1, 7):
        session.push_and_average({"w": np.ones(3, np.float32)}, local_step=10 * step, loss=(index + 1) / step)
        if index == 1 and step == last:
            os.kill(os.getpid(), signal.SIGKILL)
    session.finish()
"""
SILENT = TRAINING.replace(", loss=(index + 1) / step", "")
HINT = (
    "ma-launch: no worker has reported a loss, so this run has no curves. To get them: `optimizer.loss = loss.item()` "
    "before `optimizer.step()`, or `push_and_average(..., loss=...)`"
)
Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch(SCRIPT TEXT, *ARGS, flags=(...), environ={...}) -> ma-launch at work on it in ``tmp_path``."""
    running: list[Launched] = []

    def start(text: str, *args: str, flags: tuple[str, ...] = (), environ: Mapping[str, str] | None = None) -> Launched:
        (tmp_path / "script.py").write_text(text)
        command = ["-m", "ps_worker.launch", "--no-page", "--workers", "2", *flags, "--", "script.py", *args]
        running.append(Launched(command, cwd=tmp_path, environ=environ))
        return running[-1]

    yield start
    for launched in running:
        launched.__exit__(None, None, None)


def only_run(tmp_path: Path) -> Path:
    (run,) = (tmp_path / "runs").iterdir()
    return run


def rounds_in(logs: Path, index: int) -> list[tuple[int, float | None]]:
    lines = (logs / f"worker-{index}.jsonl").read_text().splitlines()
    return [(line.local_step, line.loss) for line in map(LoggedRound.from_line, lines)]


def test_a_run_leaves_its_rounds_and_their_picture_and_says_where(launch: Launch, tmp_path: Path) -> None:
    launched = launch(TRAINING, "0", flags=("--ps", "2"))
    assert launched.ended() == 0, launched.printed()
    run = only_run(tmp_path)
    for index in (0, 1):
        assert rounds_in(run / "rounds", index) == [(10 * step, (index + 1) / step) for step in range(1, 7)]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert said(launched)[-1] == f"ma-launch: curves of the loss: runs/{run.name}/curves.png"
    assert HINT not in launched.errors
    assert launched.lines == []  # the plot is for terminals


def test_in_a_terminal_a_run_ends_with_a_plot(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINING)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ps_worker.launch", "--no-page", "--workers", "2", "--", "script.py", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    printed = b""
    try:
        while True:
            printed += os.read(ours, 1 << 16)
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(ours)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, errors
    lines = printed.decode().splitlines()
    assert lines[0].startswith("Loss as reported")
    assert lines[-1] == "  at end  0 worker-0 0.167   1 worker-1 0.333   * several of them"


def test_the_line_of_a_killed_worker_ends_where_it_died(launch: Launch, tmp_path: Path) -> None:
    launched = launch(TRAINING, "3", flags=("--min-workers", "1", "--grace-s", "0.1"))
    assert launched.ended() == 1
    run = only_run(tmp_path)
    assert [step for step, _ in rounds_in(run / "rounds", 0)] == [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in rounds_in(run / "rounds", 1)] == [10, 20, 30]
    assert (run / "curves.png").exists()
    assert said(launched)[-1] == f"ma-launch: curves of the loss: runs/{run.name}/curves.png"
    assert "ma-launch: worker-1 was ended by SIGKILL" in launched.errors


@pytest.mark.long
def test_a_worker_that_starts_again_goes_on_with_its_log(launch: Launch, tmp_path: Path) -> None:
    once = TRAINING.replace(
        "step == last", "step == last and not os.path.exists('died') and not open('died', 'x').close()"
    )
    launched = launch(once, "3", flags=("--max-restarts", "1"))
    launched.wait_for("it starts again")
    launched.wait_for("curves of the loss")
    lines = (only_run(tmp_path) / "rounds" / "worker-1.jsonl").read_text().splitlines()
    sessions = [LoggedRound.from_line(line).session for line in lines if line]
    assert len(set(sessions)) == 2
    assert sessions[:3] == [sessions[0]] * 3
    assert sessions[3:]
    assert sessions[0] not in sessions[3:]


def test_without_a_loss_a_run_says_once_how_to_report_one_and_leaves_nothing(launch: Launch, tmp_path: Path) -> None:
    launched = launch(SILENT, "0")
    assert launched.ended() == 0, launched.printed()
    assert launched.errors.count(HINT) == 1
    assert not (tmp_path / "runs").exists()


def test_a_script_without_rounds_hears_nothing_of_losses(launch: Launch, tmp_path: Path) -> None:
    launched = launch("print('done')")
    assert launched.ended() == 0, launched.printed()
    assert "loss" not in launched.printed()
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_cannot_be_made_costs_the_curves_and_nothing_else(launch: Launch) -> None:
    launched = launch(TRAINING, "0", flags=("--runs", "script.py"))
    assert launched.ended() == 0, launched.printed()
    assert [line for line in launched.errors if "curves" in line] == [
        "ma-launch: script.py cannot be written (File exists): this run will have no curves; --runs names another place"
    ]


def test_the_directory_that_the_user_names_gets_the_logs_and_the_picture(launch: Launch, tmp_path: Path) -> None:
    launched = launch(TRAINING, "0", environ={ROUND_LOG: "mine"})
    assert launched.ended() == 0, launched.printed()
    assert len(rounds_in(tmp_path / "mine", 0)) == 6
    assert (tmp_path / "mine" / "curves.png").exists()
    assert not (tmp_path / "runs").exists()
