"""What ma-launch does about curves at the end of a run, by how the run ended and what is installed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ma_client.files.round_log import ROUND_LOG, RoundLog
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.curves.after_run import RunCurves
from ps_worker.curves.run_directory import CURVES

WITH_LOSS = pb.GetStatusResponse(rounds_committed=3, workers=[pb.WorkerStatus(worker_id="w", loss=1.0)])
WITHOUT_LOSS = pb.GetStatusResponse(rounds_committed=3, workers=[pb.WorkerStatus(worker_id="w")])
NO_ROUND = pb.GetStatusResponse(workers=[pb.WorkerStatus(worker_id="w")])


class Terminal(io.StringIO):
    """A terminal that keeps what is printed."""

    def isatty(self) -> bool:
        """True."""
        return True


class Run:
    """A run in ``directory``.

    Attributes:
        said: the lines that were said.
        curves: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self.said = list[str]()
        self.curves = RunCurves(directory / "runs", self.said.append, {})
        self.logs = Path(self.curves.environ[ROUND_LOG])

    def log_rounds(self) -> None:
        """Its worker logs two rounds."""
        log = RoundLog(self.logs, "worker-0")
        for step in (1, 2):
            log.note(1 / step, step, step, 0.0, 10, 10)
        log.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("exit_code", "has_plot", "has_picture"),
    [(0, True, True), (130, True, True), (1, False, True), (143, False, False), (129, False, False)],
    ids=["well", "Ctrl-C", "error", "SIGTERM", "SIGHUP"],
)
def test_the_plot_and_the_picture_come_with_the_right_ends(
    run: Run, exit_code: int, has_plot: bool, has_picture: bool
) -> None:
    run.log_rounds()
    out = Terminal()
    run.curves.end(exit_code, out)
    assert ("Loss as reported" in out.getvalue()) == has_plot
    assert (run.logs.parent / CURVES).exists() == has_picture
    where = f"runs/{run.logs.parent.name}"
    drawn = f"curves of the loss: {where}/curves.png"
    assert run.said == [
        drawn if has_picture else f"the loss of every round is in {where}; `ps-worker curves {where}` draws it"
    ]


def test_where_no_terminal_is_there_is_no_plot(run: Run) -> None:
    run.log_rounds()
    out = io.StringIO()
    run.curves.end(0, out)
    assert out.getvalue() == ""
    assert (run.logs.parent / CURVES).exists()


def test_without_matplotlib_the_plot_is_there_and_the_way_to_the_picture_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ps_worker.curves.after_run.find_spec", lambda _: None)
    run.log_rounds()
    out = Terminal()
    run.curves.end(0, out)
    assert "Loss as reported" in out.getvalue()
    (said,) = run.said
    assert said.endswith("draws them once matplotlib is installed (pip install matplotlib)")


@pytest.mark.parametrize(
    ("status", "is_well", "hints"),
    [(WITHOUT_LOSS, True, 1), (WITHOUT_LOSS, False, 0), (WITH_LOSS, True, 0), (NO_ROUND, True, 0)],
)
def test_how_to_report_a_loss_is_said_only_after_rounds_without_one(
    run: Run, status: pb.GetStatusResponse, is_well: bool, hints: int
) -> None:
    run.curves.heard([status], is_well)
    assert len(run.said) == hints
    assert all("optimizer.loss = loss.item()" in line for line in run.said)


def test_a_run_without_a_loss_leaves_nothing_but_what_was_there(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "of another run"
    other.mkdir()
    run.curves.heard([WITHOUT_LOSS], True)
    run.curves.end(0, io.StringIO())
    assert list((tmp_path / "runs").iterdir()) == [other]


def test_losses_that_were_logged_on_other_machines_are_said_to_be_there(run: Run) -> None:
    run.curves.heard([WITH_LOSS], True)
    run.curves.end(0, io.StringIO())
    (said,) = run.said
    assert f"no worker has logged its rounds in {run.logs} on this machine" in said


def test_a_picture_that_cannot_be_written_is_said(run: Run) -> None:
    run.log_rounds()
    (run.logs.parent / CURVES).mkdir()
    run.curves.end(0, io.StringIO())
    (said,) = run.said
    assert said == f"no curves: {run.logs.parent / CURVES}: Is a directory"
