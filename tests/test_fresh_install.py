"""The wheel in an environment of its own, from a package index: without torch, and with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelaverage
from tests.distribution import ROOT, build, copy_of_the_tree
from tests.recorded import without_a_cluster

INSTALL_TIMEOUT_S = 900
RUN_TIMEOUT_S = 120
COMMANDS = ("ps-server", "ps-worker", "ma-launch")


class Environment:
    """A virtual environment with the wheel and what it needs."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        self._folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=RUN_TIMEOUT_S)
        wanted = f"torch-model-average{extra} @ {wheel.as_uri()}"
        constraints = str(ROOT / "constraints.txt")
        self.run("python", "-m", "pip", "install", "--constraint", constraints, wanted, timeout_s=INSTALL_TIMEOUT_S)

    def run(self, program: str, *arguments: str, code: int = 0, timeout_s: float = RUN_TIMEOUT_S) -> str:
        """What it prints, on both outputs."""
        environ = {name: value for name, value in without_a_cluster(os.environ).items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self._folder / "venv" / "bin" / program), *arguments],
            cwd=self._folder,
            env={**environ, "PYTHONNOUSERSITE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == code, f"{program} {' '.join(arguments)}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build(copy_of_the_tree(folder / "tree"), folder)[1]


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[torch]"], ids=["without torch", "with torch"])
def test_a_wheel_from_an_index_works_in_a_fresh_environment(extra: str, wheel: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path, wheel, extra)
    where = fresh.run("python", "-c", "import ma_client; print(ma_client.__version__, ma_client.__file__)")
    assert where.startswith(f"{modelaverage.__version__} {tmp_path}")
    for command in COMMANDS:
        assert fresh.run(command, "--version") == f"{command} {modelaverage.__version__}\n"
        assert fresh.run(command, "--help").startswith(f"usage: {command}")
    script = ROOT / "examples" / ("train.py" if extra else "numpy_only.py")
    printed = fresh.run("ma-launch", "--workers", "2", "--", str(script))
    assert {"[worker-0]", "[worker-1]"} == {
        line.partition(" ")[0] for line in printed.splitlines() if line[:8] == "[worker-"
    }
    optimizer = ("python", "-c", "from ma_client import ModelAverageOptimizer")
    if extra:
        assert fresh.run(*optimizer) == ""
        assert printed.count("accuracy of the center: 0.9") + printed.count("accuracy of the center: 1.0") == 2
    else:
        last = fresh.run(*optimizer, code=1).splitlines()[-1]
        assert last.startswith("ImportError: ModelAverageOptimizer needs torch (")
        assert last.endswith("pip install 'torch-model-average[torch]'")
