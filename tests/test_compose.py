"""docker/compose.yaml, for real: built, run to the end, killed in the middle. Skipped where no engine answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load

from tests.compose import BUILD_TIMEOUT_S, FOLDER, Compose, crash, docker, no_engine, until

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(no_engine()), reason=no_engine())]

MB = 1_000_000
LAYERS = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "classify.weight", "classify.bias"]


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    Compose("modelaverage-test", {})("build", timeout_s=BUILD_TIMEOUT_S)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> str:
    return f"ma-{os.getpid()}-{abs(hash(request.node.name)) % 10_000}"


def last_accuracy(logs: str) -> float:
    return float(re.findall(r"test accuracy ([0-9.]+)", logs)[-1])


def test_the_servers_image_is_small_and_has_no_torch() -> None:
    sizes = [
        json.loads(docker("image", "inspect", image))[0]["Size"]
        for image in ("torch-model-average-ps", "python:3.11-slim-bookworm")
    ]
    assert sizes[0] - sizes[1] < 150 * MB
    code = "import importlib.util as i; print(i.find_spec('torch'), i.find_spec('numpy') is not None)"
    assert docker("run", "--rm", "--entrypoint", "python", "torch-model-average-ps", "-c", code) == "None True\n"


def test_up_trains_to_the_end_and_leaves_the_model_and_checkpoints_in_volumes(project: str) -> None:
    with Compose(project, {}) as compose:
        compose.up()
        assert [c.exit_code for c in compose.wait_for_end()] == [0, 0]
        assert last_accuracy(compose.logs("worker")) > 0.98
        assert load(compose.read("center", "center.safetensors")).keys() == set(LAYERS)
        assert any(re.fullmatch(r"center-0+12\.\w+\.safetensors", name) for name in compose.files("checkpoints"))
        compose("stop", "--timeout", "8")
        assert [c.exit_code for c in compose.containers("ps")] == [0]  # SIGTERM was enough


def test_nothing_runs_as_root_or_can_write_outside_its_volumes(project: str) -> None:
    with Compose(project, {}) as compose:
        compose.up("ps")
        code = (
            "import os\nprint(os.getuid())\n"
            "try: open('/home/modelaverage/x', 'w')\nexcept OSError as error: print(error.strerror)"
        )
        assert compose("exec", "-T", "ps", "python", "-c", code) == "10001\nRead-only file system\n"


def test_the_page_is_where_the_server_prints_it(project: str) -> None:
    with Compose(project, {}) as compose:
        compose.up("ps")
        until(lambda: "page at " in compose.logs("ps"), "the address of the page")
        (url,) = re.findall(r"page at (http://\S+)", compose.logs("ps"))
        assert compose("port", "ps", url.rpartition(":")[2]) == f"127.0.0.1:{url.rpartition(':')[2]}\n"
        code = (
            "import urllib.request\n"
            f"for path in ('/', '/api/status'): print(urllib.request.urlopen({url!r} + path).read().decode())"
        )
        shown = compose("exec", "-T", "ps", "python", "-c", code)
        assert "<title>" in shown
        assert json.loads(shown.splitlines()[-1])["status"]["phase"]


def test_what_is_killed_in_mid_run_comes_back_and_the_run_ends_as_if_nothing_had_been(project: str) -> None:
    with Compose(project, {"ARGS": "--steps 1600 --interval-steps 20"}) as compose:
        compose.up()
        until(lambda: compose.step() >= 5, "the fifth round")
        # A container that dies on its own is started again by the engine.
        crash(compose.containers("worker")[0])
        crash(compose.containers("ps")[0])
        for service in ("worker", "ps"):
            until(lambda: compose.containers(service)[0].restarts == 1, f"{service} is started again")  # noqa: B023
        # `docker kill` is somebody's wish, which the engine respects; `up` brings back what was killed.
        step = compose.step("--timeout-s", "30")
        until(lambda: compose.step() >= step + 5, "rounds go on")
        for service in ("worker", "ps"):
            docker("kill", compose.containers(service)[-1].name)
        compose.up()
        workers = compose.wait_for_end()
        assert [c.exit_code for c in workers] == [0, 0]
        assert compose.step() == 1600 // 20
        assert last_accuracy(compose.logs("worker")) > 0.97


def test_four_workers_and_two_servers_over_mutual_tls_and_nobody_else_gets_in(project: str, tmp_path: Path) -> None:
    subprocess.run([FOLDER / "make-certs", tmp_path], check=True, capture_output=True, timeout=30)
    environ = {
        "WORKERS": "4",
        "PS_HOSTS": "ps:2222,ps-1:2222",
        "ARGS": "--steps 200 --interval-steps 20",
        "CERTS": str(tmp_path),
    }
    with Compose(project, environ, files=("compose.tls.yaml",), profile="shards") as compose:
        compose.up()
        assert [c.exit_code for c in compose.wait_for_end()] == [0, 0, 0, 0]
        logs = compose.logs("worker")
        assert all(f"worker-{index}: " in logs for index in range(4))
        assert load(compose.read("center", "center.safetensors")).keys() == set(LAYERS)
        assert len(compose.files("checkpoints")) > 1
        assert len(compose.files("checkpoints-1")) > 1
        stranger = ["ps-worker", "digits", "--ps-hosts", "ps:2222", "--task-index", "auto", "--connect-timeout-s", "5"]
        done = subprocess.run(
            ["docker", "run", "--rm", "--network", f"{project}_default", "--entrypoint", stranger[0]]
            + ["torch-model-average-worker", *stranger[1:]],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
