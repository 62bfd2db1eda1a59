"""docs/trainers.md and examples/trainers: third-party training loops, as a reader would run them."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.launched import Launched
from tests.recorded import torchrun, without_a_cluster
from tests.test_server_process import ServerProcess

ROOT = Path(__file__).parents[1]
EXAMPLES = {"accelerate": 12, "lightning": 12, "transformers": 8}  # and their rounds
WORKERS = 2
RANKS = 2  # of each worker, if it is a group
TIMEOUT_S = 180
# Trainers use no network, do not fail on their own warnings, and see one processor each.
ENVIRON = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}


def without(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: the extra `trainers`")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_a_cluster(os.environ).keys():
        monkeypatch.delenv(name)


def example(package: str) -> str:
    return f"examples/trainers/with_{package}.py"


@pytest.mark.long
@pytest.mark.parametrize("package", [pytest.param(name, marks=without(name)) for name in EXAMPLES])
def test_a_trainer_ends_with_one_good_center_for_all_workers(package: str) -> None:
    command = ["-m", "ps_worker.launch", "--workers", str(WORKERS), "--", example(package)]
    with Launched(command, cwd=ROOT, environ=ENVIRON) as launched:
        assert launched.ended(TIMEOUT_S) == 0, launched.printed()
    for worker in range(WORKERS):
        assert f"[worker-{worker}] rounds: {EXAMPLES[package]}" in launched.lines
    first, second = re.findall(r"accuracy of the center: (\S+)", launched.printed())
    assert first == second
    assert float(first) > 0.9
    assert "averages the gradients" not in launched.printed()


@pytest.mark.long
@pytest.mark.parametrize("package", [pytest.param(name, marks=without(name)) for name in EXAMPLES])
def test_under_torchrun_the_ranks_of_a_trainer_are_one_worker(package: str, tmp_path: Path) -> None:
    torchrun_script = Path(sysconfig.get_path("scripts")) / "torchrun"
    command = ["-m", "ps_worker.launch", "--workers", str(WORKERS), "--", str(torchrun_script)]
    command += ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS)]
    command += ["tests/trainer_rank.py", example(package), "2", str(tmp_path)]
    # On CPUs, accelerate has to be told what it does unasked on GPUs.
    environ = {**ENVIRON, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    with Launched(command, cwd=ROOT, environ=environ) as launched:
        assert launched.ended(TIMEOUT_S) == 0, launched.printed()
    said = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert said.keys() == {f"{worker}-{rank}" for worker in range(WORKERS) for rank in range(RANKS)}
    (end,) = set(said.values())  # all ranks of all workers have the same bits
    assert end.startswith("2 ")
    for worker in range(WORKERS):
        assert launched.lines.count(f"[worker-{worker}] rounds: 2") == 1  # said by one rank
    assert "averages the gradients" not in launched.printed()


@pytest.mark.long
@without("accelerate")
def test_a_trainer_that_averages_the_gradients_of_several_workers_is_warned_about(tmp_path: Path) -> None:
    source = (ROOT / example("accelerate")).read_text(encoding="utf-8")
    script = tmp_path / "without_a_group.py"
    script.write_text(source.replace("process_group=", "# process_group="), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(WORKERS), "--log-dir", str(tmp_path), "--redirects", "2"]
    with ServerProcess(num_workers=WORKERS) as server:
        environ = {**ENVIRON, "MA_PS_HOSTS": server.address, "ACCELERATE_USE_CPU": "true"}
        with Launched([*command, str(script)], cwd=ROOT, environ=environ) as launched:
            assert launched.ended(TIMEOUT_S) == 0, launched.printed()
    for errors in tmp_path.glob("**/stderr.log"):
        text = errors.read_text(encoding="utf-8")
        assert text.count("DistributedDataParallel, which averages the gradients of 2 processes") == 1, text
    assert len(list(tmp_path.glob("**/stderr.log"))) == WORKERS


@pytest.mark.long
@without("accelerate")
def test_a_trainer_sees_one_process_after_what_the_page_says_for_torchrun(start_server: StartServer) -> None:
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = ["import os", "from accelerate import Accelerator", "from ma_client import *", block]
    code += ["session = ParameterServerSession.from_env()"]
    code += ["print(Accelerator(cpu=True).num_processes, cluster.task_index, session.worker_id)"]
    environ = {**ENVIRON, **torchrun(), "MA_PS_HOSTS": start_server(WORKERS).address}
    with Launched(["-c", "\n".join(code)], cwd=ROOT, environ=environ) as launched:
        assert launched.ended(TIMEOUT_S) == 0, launched.printed()
    assert launched.lines == ["1 1 worker-1"]


def test_the_page_has_the_examples_as_they_are() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    sources = [(ROOT / example(package)).read_text(encoding="utf-8") for package in EXAMPLES]
    for block in blocks:
        lines = [line.strip() for line in block.splitlines() if line.strip() not in ("", "...")]
        assert any(all(line in map(str.strip, source.splitlines()) for line in lines) for source in sources), block
    for package in EXAMPLES:
        assert f"(../{example(package)})" in page


def test_an_example_is_not_named_as_what_it_imports() -> None:
    # `python examples/trainers/lightning.py` would import itself.
    for path in (ROOT / "examples").rglob("*.py"):
        assert path.stem not in sys.stdlib_module_names | {"accelerate", "jax", "keras", "lightning", "transformers"}
