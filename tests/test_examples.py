"""The examples and the code in the porting guide do what they say, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from ma_client import ClusterSpec
from tests.conftest import StartServer
from tests.launched import Launched
from tests.prepared import Prepared
from tests.recorded import kubernetes, slurm, tf_config, without_a_cluster
from tests.test_server_process import ServerProcess

ROOT = Path(__file__).parent.parent
WORKERS = 2
# Runs a script as `python SCRIPT` does, and fails if that imported torch.
WITHOUT_TORCH = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'torch' not in sys.modules"


# Environments of worker I by launcher, for a server at ADDRESS.
LAUNCHERS: dict[str, Callable[[int, str], Mapping[str, str]]] = {
    "TF_CONFIG": tf_config,
    "Slurm": lambda index, address: {**slurm(index), "MA_PS_HOSTS": address},
    "Kubernetes": kubernetes,
}


def of_worker(environ: Mapping[str, str]) -> dict[str, str]:
    # Threads that spin on shared cores cost more than everything else; the launcher prevents it, too.
    return {**without_a_cluster(os.environ), **environ, "OMP_NUM_THREADS": "1"}


def run_workers(environs: Sequence[Mapping[str, str]], *command: str) -> list[str]:
    """Runs a job; returns what each worker printed."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            env=of_worker(environ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environ in environs
    ]
    try:
        printed = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * WORKERS, "\n".join(printed)
    return printed


def assert_trained(first: Sequence[str], second: Sequence[str]) -> None:
    """Checks the lines of two workers of train.py: all rounds, a falling loss, and one good center."""
    for lines in (first, second):
        assert [line.split(":")[0] for line in lines[:-1]] == [f"round {number}" for number in range(1, 13)]
    losses = [float(line.split()[-1]) for line in first[:-1]]
    assert losses[-1] < losses[0] / 2
    assert first[-1].startswith("accuracy of the center: ")
    assert float(first[-1].split()[-1]) > 0.95
    assert second[-1] == first[-1]


def test_train_ends_with_one_good_center_for_processes_that_have_imported_torch_before() -> None:
    with ServerProcess(num_workers=WORKERS) as server:
        environs = [of_worker(tf_config(index, server.address)) for index in range(WORKERS)]
        workers = [Prepared("examples.train", pipes=True, environ=environ, cwd=ROOT) for environ in environs]
        try:
            printed = [worker.communicate(timeout_s=120) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORKERS, printed
    assert_trained(*(out.splitlines() for out, _ in printed))


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_train_ends_with_one_good_center_for_all_workers(launcher: str) -> None:
    environ_of = LAUNCHERS[launcher]
    with ServerProcess(num_workers=WORKERS) as server:
        printed = run_workers([environ_of(index, server.address) for index in range(WORKERS)], "examples/train.py")
    assert_trained(*(text.splitlines() for text in printed))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
def test_train_runs_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ.keys() - without_a_cluster(os.environ).keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun += ["--nproc-per-node", str(WORKERS), "--log-dir", str(tmp_path), "--redirects", "1"]
    with ServerProcess(num_workers=WORKERS) as server:
        monkeypatch.setenv("MA_PS_HOSTS", server.address)
        with Launched([*torchrun, "examples/train.py"], cwd=ROOT) as launched:
            assert launched.ended(timeout_s=120) == 0, launched.printed()
            assert launched.descendants() == []
    first, second = sorted(tmp_path.glob("**/stdout.log"))
    assert_trained(first.read_text().splitlines(), second.read_text().splitlines())


def test_numpy_only_finds_the_line_without_torch(start_server: StartServer) -> None:
    address = start_server(WORKERS).address
    environs = [ClusterSpec((address,), WORKERS, index).to_env() for index in range(WORKERS)]
    printed = run_workers(environs, "-c", WITHOUT_TORCH, "examples/numpy_only.py")
    for lines in (text.splitlines() for text in printed):
        assert len(lines) == 11
        assert lines[-1] == printed[0].splitlines()[-1]
        w1, w2, b = (float(number) for number in re.findall(r"-?\d+\.\d+", lines[-1]))
        assert (w1, w2, b) == pytest.approx((2.0, -3.0, 0.5), abs=0.01)


@pytest.mark.long
def test_a_keras_model_ends_with_one_good_center_for_all_workers(start_server: StartServer) -> None:
    address = start_server(WORKERS).address
    environs = [ClusterSpec((address,), WORKERS, index).to_env() for index in range(WORKERS)]
    printed = run_workers(environs, "-W", "default", "examples/keras_digits.py")  # Keras itself warns
    for lines in (text.splitlines() for text in printed):
        rounds = [line.split(":")[0] for line in lines if line.startswith("round ")]
        assert rounds == [f"round {number}" for number in range(1, 9)]
        assert lines[-1].startswith("accuracy of the center: ")
        assert lines[-1] == printed[0].splitlines()[-1]
        assert float(lines[-1].split()[-1]) > 0.9


@pytest.mark.parametrize(("page", "at_least"), [("porting-from-tensorflow.md", 9), ("training.md", 4)])
def test_the_code_of_a_page_runs(
    page: str, at_least: int, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ClusterSpec((start_server(1).address,), 1, 0).to_env().items():
        monkeypatch.setenv(name, value)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    ours = [block for block in blocks if not block.startswith("# TensorFlow")]
    assert len(ours) >= at_least
    namespace: dict[str, object] = {"__name__": "page"}
    for block in ours:
        exec(compile(block, page, "exec"), namespace)
