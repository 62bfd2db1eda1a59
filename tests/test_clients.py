"""The clients in other languages: each passes the conformance kit, and all share one barrier with Python's."""

from __future__ import annotations

import fcntl
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import ParameterServerSession
from tests.test_server_process import ServerProcess

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "examples/clients"
PYTHON_CLIENT = [sys.executable, str(CLIENTS / "python/client.py")]
# What a language needs, by the commands that Debian's packages bring.
TOOLS = {
    "node": ["node", "npm"],
    "cpp": ["g++", "cmake", "pkg-config", "protoc", "grpc_cpp_plugin"],
    "go": ["go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"],
}
ROUNDS, STEPS_PER_ROUND, LEARNING_RATE = 100, 10, 0.5
TIMEOUT_S = 300


def missing(language: str) -> str:
    """Why the client cannot be built; empty if it can."""
    if not (CLIENTS / language / "client").exists():
        return f"examples/clients/{language} has no client"
    tools = [tool for tool in TOOLS[language] if shutil.which(tool) is None]
    return f"{', '.join(tools)}: not installed" if tools else ""


INSTALLED = [language for language in TOOLS if not missing(language)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


def built(language: str) -> list[str]:
    """Builds the client, in one process at a time, and returns its command."""
    with (CLIENTS / language / "build").open() as script:
        fcntl.flock(script, fcntl.LOCK_EX)
        done = run(str(CLIENTS / language / "build"))
    assert done.returncode == 0, done.stdout + done.stderr
    return [str(CLIENTS / language / "client")]


@pytest.mark.long
@pytest.mark.parametrize("language", TOOLS)
def test_a_client_passes_every_case(language: str) -> None:
    if missing(language):
        pytest.skip(missing(language))
    done = run(sys.executable, "-m", "modelaverage.conformance", *built(language), "conform")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 missed" in done.stdout


def digits_py(*arguments: str) -> int:
    """Exit code of digits.py, run in this process, which may have imported scikit-learn before."""
    with mock.patch.object(sys, "argv", ["digits.py", *arguments]), pytest.raises(SystemExit) as end:
        runpy.run_path(str(CLIENTS / "digits.py"), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


# All in one barrier.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.csv"
    assert digits_py(str(path)) == 0
    return path


class Simulation:
    """A numpy simulation of what README.md says that the workers do."""

    def __init__(self, digits: Path, workers: int) -> None:
        rows = np.loadtxt(digits, delimiter=",")
        self._labels, self._inputs = rows[:, 0].astype(int), rows[:, 1:] / 16
        self.weights: NDArray[np.float64] = np.zeros((64, 10))
        self.bias: NDArray[np.float64] = np.zeros(10)
        parts = np.arange(len(rows)) % workers
        for _ in range(ROUNDS):
            trained = [self._train(parts == part) for part in range(workers)]
            self.weights = np.add.reduce([weights for weights, _ in trained]) / workers
            self.bias = np.add.reduce([bias for _, bias in trained]) / workers

    def _train(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inputs, wanted = self._inputs[rows], np.eye(10)[self._labels[rows]]
        weights, bias = self.weights, self.bias
        for _ in range(STEPS_PER_ROUND):
            scores = inputs @ weights + bias
            odds = np.exp(scores - scores.max(axis=1)[:, None])
            error = (odds / odds.sum(axis=1)[:, None] - wanted) / len(wanted)
            weights, bias = weights - LEARNING_RATE * inputs.T @ error, bias - LEARNING_RATE * error.sum(axis=0)
        return weights, bias

    @property
    def accuracy(self) -> float:
        return float(np.mean(np.argmax(self._inputs @ self.weights + self.bias, axis=1) == self._labels))


def assert_one_barrier(clients: Sequence[tuple[str, list[str]]], digits: Path) -> None:
    """Clients of these languages, by their commands, train as the workers of one job; the first one is the chief."""
    count = len(clients)
    with ServerProcess(num_workers=count) as server:
        workers = [
            subprocess.Popen(
                [*command, "train", "--server", server.address, "--worker-id", f"worker-{part}", "--data", str(digits)]
                + ["--part", f"{part}/{count}", "--rounds", str(ROUNDS)]
                + (["--chief"] if part == 0 else []),
                # Threads that spin on shared cores cost more than everything else.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for part, (_, command) in enumerate(clients)
        ]
        try:
            printed = [worker.communicate(timeout=TIMEOUT_S) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        assert [worker.returncode for worker in workers] == [0] * count, printed
        with ParameterServerSession([server.address], worker_id="test") as session:
            status = session.status()
            center, step = session.pull(catch_up=False)
    simulation = Simulation(digits, count)
    assert step == ROUNDS
    assert status.job_over, "all have said that they have finished"
    assert [worker.pushes_counted for worker in status.workers if worker.worker_id != "test"] == [ROUNDS] * count
    np.testing.assert_allclose(center["weights"], simulation.weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(center["bias"], simulation.bias, rtol=1e-9, atol=1e-12)
    assert simulation.accuracy > 0.9
    for part, ((language, _), (out, err)) in enumerate(zip(clients, printed, strict=True)):
        assert out == (
            f"worker-{part} ({language}): {ROUNDS} rounds, global_step {ROUNDS}, accuracy {simulation.accuracy:.4f}\n"
        )
        assert len(err.splitlines()) == ROUNDS // 10, err


def test_two_python_workers_end_with_the_center_of_a_simulation(digits: Path) -> None:
    assert_one_barrier([("python", PYTHON_CLIENT)] * 2, digits)


@pytest.mark.long
def test_workers_in_four_languages_stand_in_one_barrier(digits: Path) -> None:
    if not INSTALLED:
        pytest.skip("; ".join(missing(language) for language in TOOLS))
    others = [(language, built(language)) for language in INSTALLED]
    assert_one_barrier([("python", PYTHON_CLIENT), *others], digits)


def test_wrong_arguments_show_how_digits_py_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert digits_py() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--part", "4/4", "'4/4' is not I/N"), ("--data", "no-such.csv", "no-such.csv"), ("--worker-id", "", "worker id")],
)
def test_the_python_client_names_what_is_wrong(option: str, value: str, message: str, digits: Path) -> None:
    options = {"--server": "127.0.0.1:1", "--worker-id": "a", "--data": str(digits), "--part": "0/1", "--rounds": "1"}
    options[option] = value
    done = run(*PYTHON_CLIENT, "train", *[word for pair in options.items() for word in pair])
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
