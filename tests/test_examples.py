"""The examples and the code in the porting guide do what they say, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ma_client import ClusterSpec
from tests.conftest import StartServer

ROOT = Path(__file__).parent.parent
WORKERS = 2
# Runs a script as `python SCRIPT` does, and fails if that imported torch.
WITHOUT_TORCH = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'torch' not in sys.modules"


def run_workers(start_server: StartServer, *command: str) -> list[str]:
    """What each worker of a job printed."""
    address = start_server(WORKERS).address
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            # Threads that spin on cores they share cost more than all the rest; the launcher sees to it, too.
            env={**os.environ, **ClusterSpec((address,), WORKERS, index).to_env(), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(WORKERS)
    ]
    try:
        printed = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * WORKERS, "\n".join(printed)
    return printed


def test_train_ends_with_one_good_center_for_all_workers(start_server: StartServer) -> None:
    first, second = (printed.splitlines() for printed in run_workers(start_server, "examples/train.py"))
    losses = [float(line.split()[-1]) for line in first[:-1]]
    assert [line.split(":")[0] for line in first[:-1]] == [f"round {number}" for number in range(1, 13)]
    assert losses[-1] < losses[0] / 2
    assert first[-1].startswith("accuracy of the center: ")
    assert float(first[-1].split()[-1]) > 0.95
    assert second[-1] == first[-1]


def test_numpy_only_finds_the_line_without_torch(start_server: StartServer) -> None:
    printed = run_workers(start_server, "-c", WITHOUT_TORCH, "examples/numpy_only.py")
    for lines in (text.splitlines() for text in printed):
        assert len(lines) == 11
        assert lines[-1] == printed[0].splitlines()[-1]
        w1, w2, b = (float(number) for number in re.findall(r"-?\d+\.\d+", lines[-1]))
        assert (w1, w2, b) == pytest.approx((2.0, -3.0, 0.5), abs=0.01)


def test_the_code_of_the_porting_guide_runs(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ClusterSpec((start_server(1).address,), 1, 0).to_env().items():
        monkeypatch.setenv(name, value)
    guide = ROOT / "docs" / "porting-from-tensorflow.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL)
    ours = [block for block in blocks if not block.startswith("# TensorFlow")]
    assert len(ours) >= 8
    namespace: dict[str, object] = {"__name__": "porting_guide"}
    for block in ours:
        exec(compile(block, guide.name, "exec"), namespace)
