"""ma-launch --engine ray on a Ray cluster of several nodes, on loopback: what it runs, and what it survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ps_worker.demo import run_files
from ps_worker.engines.ray_host import OUTPUT, Command, Line, RayHost
from tests.launched import TIMEOUT_S, Launched, all_gone, said

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the nodes are 127.0.0.2 and so on; looks into /proc")

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "ps_worker.launch", "--engine", "ray")
LAUNCH_TIMEOUT_S = 120
ONE_OF_EACH = ("--ps", "1", "--workers", "1")

# Ten rounds; with two workers, each adds 0.5 to every value if nothing is lost or counted twice.
# Before round 5 worker 1 waits for a file, and the others wait for it in the round.
GATED = """
import sys, time
from pathlib import Path
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
gate = Path(sys.argv[1])
index = ClusterSpec.from_env().task_index
print("servers", *ClusterSpec.from_env().ps_hosts)
with ParameterServerSession.from_env() as session:
    if session.is_chief:
        session.initialize({"v": np.zeros(50, np.float32), "w": np.zeros(50, np.float32)})
    center, step = session.pull()
    print("goes on from", step)
    while session.base_step < 10:
        if session.base_step == 5 and index == 1:
            print("is at the gate")
            while not gate.exists():
                time.sleep(0.01)
        center = session.push_and_average({name: values + index for name, values in center.items()}).center
print("center", sorted({float(value) for values in center.values() for value in values}))
"""
WAITING = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("waiting")
signal.pause()
"""
DYING = """
import os, signal
print("dying")
os.kill(os.getpid(), signal.SIGKILL)
"""


class Nodes:
    """The cluster of `tests.ray_nodes`, and the processes on it."""

    def __init__(self, process: Launched) -> None:
        self._process = process
        (self.address,) = self._answer()

    def lose(self, kind: str, servers: int) -> list[int]:
        """Removes a node with a "worker" and no server, or with a "server"; the placement group's bundles on it."""
        self._process.tell(f"lose {kind} {servers}")
        return [int(bundle) for bundle in self._answer()]

    def _answer(self) -> list[str]:
        self._process.wait_for("ray_nodes:")
        return [line.split()[1:] for line in self._process.lines if line.startswith("ray_nodes:")][-1]

    def processes(self, part_of_command: str) -> list[int]:
        """Pids on all nodes."""
        return self._process.descendants(part_of_command)

    def worker(self, index: int, part_of_command: str) -> int:
        """The pid of the process."""
        setting = f"MA_TASK_INDEX={index}\0".encode()
        workers = self.processes(part_of_command)
        (pid,) = (pid for pid in workers if setting in Path(f"/proc/{pid}/environ").read_bytes())
        return pid


RayLaunch = Callable[..., Launched]


@pytest.fixture(scope="module")
def ray_environ() -> Iterator[dict[str, str]]:
    """Short paths, since sockets are there; nothing is sent to anybody; a Ray that is quick to start and to despair."""
    with tempfile.TemporaryDirectory(prefix="ma-", ignore_cleanup_errors=True) as directory:
        yield {
            "RAY_TMPDIR": directory,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # otherwise it keeps a token in the user's home
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "200",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }


@pytest.fixture(scope="module")
def nodes(ray_environ: dict[str, str]) -> Iterator[Nodes]:
    environ = {**ray_environ, "PYTHONWARNINGS": ""}
    with Launched(["-m", "tests.ray_nodes"], cwd=ROOT, environ=environ) as process:
        yield Nodes(process)
        assert process.process.stdin is not None
        process.process.stdin.close()
        assert process.ended() == 0, process.printed()


@pytest.fixture
def launch(nodes: Nodes, ray_environ: dict[str, str], tmp_path: Path) -> Iterator[RayLaunch]:
    """launch(SCRIPT TEXT, *ARGS, options=(...)) -> ma-launch at work on it, on the nodes."""
    running: list[Launched] = []

    def start(text: str, *args: str, options: tuple[str, ...] = ONE_OF_EACH) -> Launched:
        script = tmp_path / "script.py"
        script.write_text(text)
        command = [*LAUNCH, "--ray-address", nodes.address, *options, "--", "script.py", *args]
        running.append(Launched(command, cwd=tmp_path, environ=ray_environ))
        return running[-1]

    yield start
    for launched in running:
        launched.__exit__(None, None, None)


def assert_nothing_left(nodes: Nodes) -> None:
    assert all_gone(nodes.processes("RayHost"), timeout_s=10)
    assert nodes.processes("ps_server serve") == nodes.processes("script.py") == nodes.processes("signal.pause") == []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.02)


# What it survives.


@pytest.mark.long
def test_digits_end_right_when_a_workers_node_is_removed_in_mid_run(
    nodes: Nodes, ray_environ: dict[str, str], tmp_path: Path
) -> None:
    command = [*LAUNCH, "--ray-address", nodes.address, "--ps", "2", "--workers", "3"]
    command += ["--", "digits", "--steps", "200", "--interval-steps", "20"]
    with Launched(command, cwd=tmp_path, environ=ray_environ) as launched:
        launched.wait_for("3 workers train together")
        (run,) = (tmp_path / "runs").iterdir()
        wait_until(lambda: '"kind": "round"' in (run / run_files.METRICS).read_text())
        for index in range(3):
            os.kill(
                nodes.worker(index, "ps_worker digits"), signal.SIGSTOP
            )  # otherwise all rounds might be made before the node is gone
        bundles = nodes.lose("worker", servers=2)
        for pid in nodes.processes("ps_worker digits"):
            os.kill(pid, signal.SIGCONT)
        assert launched.ended(LAUNCH_TIMEOUT_S) == 0, launched.printed()
    workers = [f"worker-{bundle - 2}" for bundle in bundles]
    restarts = [line for line in launched.lines if "starting it again" in line]
    assert sorted(restarts) == [
        f"ma-launch: {name} has died with its node or actor; starting it again (1 of 3)" for name in workers
    ]
    summary = json.loads((run / run_files.SUMMARY).read_text())
    assert (summary["rounds"], summary["num_servers"], summary["num_workers"]) == (10, 2, 3)
    assert summary["center_accuracy"] > 0.9
    assert {path.name for path in run.iterdir()} == set(run_files.ALL)
    assert_nothing_left(nodes)


@pytest.mark.long
def test_what_is_killed_comes_back_where_it_was_and_no_round_is_lost_or_doubled(
    launch: RayLaunch, nodes: Nodes, tmp_path: Path
) -> None:
    options = ("--ps", "2", "--workers", "2", "--checkpoint-dir", "center")
    launched = launch(GATED, str(tmp_path / "gate"), options=options)
    launched.wait_for("[worker-0] goes on from 0", "[worker-1] is at the gate")
    os.kill(nodes.worker(0, "script.py"), signal.SIGKILL)
    os.kill(parent_of(nodes.processes("ps_server serve")[0]), signal.SIGKILL)
    launched.wait_for("has died with its node or actor; starting it again (1 of 3)", "[worker-0] goes on from 5")
    (tmp_path / "gate").touch()
    assert launched.ended(LAUNCH_TIMEOUT_S) == 0, launched.printed()
    assert "ma-launch: worker-0 was ended by SIGKILL; starting it again (1 of 3)" in launched.errors
    assert "has moved to" not in launched.printed()
    assert {line for line in launched.lines if "center" in line} == {f"[worker-{i}] center [5.0]" for i in range(2)}
    assert_nothing_left(nodes)


@pytest.mark.long
def test_a_server_that_moves_takes_its_center_and_its_workers_along(
    launch: RayLaunch, nodes: Nodes, tmp_path: Path
) -> None:
    options = ("--ps", "2", "--workers", "2", "--checkpoint-dir", "center")
    launched = launch(GATED, str(tmp_path / "gate"), options=options)
    launched.wait_for("[worker-0] goes on from 0", "[worker-1] is at the gate")
    nodes.lose("server", servers=2)
    launched.wait_for("has moved to", "[worker-0] goes on from 5", "[worker-1] is at the gate")
    (tmp_path / "gate").touch()
    assert launched.ended(LAUNCH_TIMEOUT_S) == 0, launched.printed()
    first, *_, last = (line.split()[2:] for line in launched.lines if "[worker-0] servers" in line)
    assert len({address.partition(":")[0] for address in first}) == 2, "both on one node"
    assert sum(before != after for before, after in zip(first, last, strict=True)) == 1
    assert {line for line in launched.lines if "center" in line} == {f"[worker-{i}] center [5.0]" for i in range(2)}


# What ends it.


@pytest.mark.long
def test_a_failing_script_ends_the_run_with_its_message(launch: RayLaunch, nodes: Nodes) -> None:
    launched = launch("print('x' * 200000)\nraise ValueError('the disk is full of cats')")
    assert launched.ended(LAUNCH_TIMEOUT_S) == 1
    report = launched.errors[launched.errors.index("ma-launch: worker-0 ended with exit code 1; its last lines:") :]
    assert report[-1] == "  ValueError: the disk is full of cats"
    assert sum(line.count("x") for line in launched.lines) == 200000
    assert_nothing_left(nodes)


@pytest.mark.long
def test_a_worker_that_is_killed_too_often_ends_the_run(launch: RayLaunch) -> None:
    launched = launch(DYING, options=(*ONE_OF_EACH, "--max-restarts", "1"))
    assert launched.ended(LAUNCH_TIMEOUT_S) == 1
    assert launched.lines == ["[worker-0] dying"] * 2
    first, happened, last = said(launched)
    assert first == "ma-launch: worker-0 was ended by SIGKILL; starting it again (1 of 1)"
    assert happened.endswith("; worker-0 (1 restart) was ended by SIGKILL")
    assert last == "ma-launch: worker-0 was ended by SIGKILL (--max-restarts 1)"


@pytest.mark.long
def test_a_dead_server_without_checkpoints_ends_the_run(launch: RayLaunch, nodes: Nodes) -> None:
    launched = launch(WAITING)
    launched.wait_for("[worker-0] waiting")
    (server,) = nodes.processes("ps_server serve")
    os.kill(server, signal.SIGKILL)
    assert launched.ended(LAUNCH_TIMEOUT_S) == 1
    happened, last = said(launched)
    assert happened.endswith("worker-0 was at work")
    assert (
        last
        == "ma-launch: parameter server ps-0 was ended by SIGKILL (with --checkpoint-dir it would be started again)"
    )
    assert_nothing_left(nodes)


@pytest.mark.long
def test_ctrl_c_leaves_nothing_on_the_cluster(launch: RayLaunch, nodes: Nodes) -> None:
    launched = launch(WAITING)
    launched.wait_for("[worker-0] waiting")
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended(timeout_s=10) == 130
    happened, last = said(launched)
    assert happened.startswith("ma-launch: no center was initialized, in ")
    assert last == "ma-launch: ended by SIGINT, and every process with it"
    assert_nothing_left(nodes)


@pytest.mark.long
def test_ctrl_c_ends_the_wait_for_room(launch: RayLaunch) -> None:
    launched = launch(WAITING, options=("--ps", "1", "--workers", "9"))
    launched.wait_for("waiting until Ray has room")
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended(timeout_s=10) == 130
    assert said(launched) == [
        "ma-launch: waiting until Ray has room: 10 CPU needed, 9 of 9 free",
        "ma-launch: ended by SIGINT, and every process with it",
    ]


@pytest.mark.long
def test_a_killed_launcher_leaves_nothing_on_the_cluster(launch: RayLaunch, nodes: Nodes) -> None:
    launched = launch("import signal\nprint('waiting')\nsignal.pause()")
    launched.wait_for("[worker-0] waiting")
    orphans = [pid for part in ("ps_server serve", "script.py", "RayHost") for pid in nodes.processes(part)]
    assert len(orphans) == 4
    launched.process.kill()
    assert all_gone(orphans, timeout_s=10)


# The source of scripts.


@pytest.mark.long
def test_a_working_dir_is_copied_to_the_nodes(launch: RayLaunch, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("NAME = 'helper'\n")
    text = "import os, sys\nfrom helper import NAME\nprint(sys.argv, NAME, os.getcwd())"
    launched = launch(text, "--lr", "1", options=(*ONE_OF_EACH, "--working-dir", str(tmp_path)))
    assert launched.ended(LAUNCH_TIMEOUT_S) == 0, launched.printed()
    (line,) = launched.lines
    assert line.startswith("[worker-0] ['script.py', '--lr', '1'] helper /")
    assert not line.endswith(str(tmp_path))


def test_a_node_without_the_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    async def run() -> list[list[Line] | int]:
        command = Command("worker-0", ["-c", ""], {}, str(tmp_path / "nowhere"), events_flag=None)
        return [news async for news in RayHost(None).run(command)]

    with pytest.raises(FileNotFoundError, match="nowhere"):
        asyncio.run(run())


def test_a_host_runs_one_process_at_a_time(tmp_path: Path) -> None:
    def command(text: str) -> Command:
        return Command("worker-0", ["-u", "-c", text], {}, str(tmp_path), events_flag=None)

    async def run() -> None:
        host = RayHost(None)
        first = host.run(command("import signal; print('first'); signal.pause()"))
        assert await anext(first) == [(OUTPUT, "first")]
        second = host.run(command("print('second')"))
        assert [news async for news in second] == [[(OUTPUT, "second")], 0]
        assert [news async for news in first] == [-signal.SIGTERM]

    asyncio.run(run())


# Without a cluster.


@pytest.mark.long
def test_a_local_cluster_is_a_new_one_on_loopback_that_ends_with_the_run(
    ray_environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("import os\nprint(os.environ['MA_PS_HOSTS'])")
    # Only with "local": without an address Ray would find the nodes of the other tests.
    command = [*LAUNCH, "--ray-address", "local", *ONE_OF_EACH, "--", "script.py"]
    with Launched(command, cwd=tmp_path, environ=ray_environ) as launched:
        assert launched.ended(LAUNCH_TIMEOUT_S) == 0, launched.printed()
        (line,) = launched.lines
        assert line.startswith("[worker-0] 127.0.0.1:")
        assert all_gone(launched.descendants(), timeout_s=10)


def mistake(tmp_path: Path, *options: str) -> tuple[int, list[str]]:
    (tmp_path / "script.py").write_text("")
    with Launched(["-m", "ps_worker.launch", *options, "--", "script.py"], cwd=tmp_path) as launched:
        return launched.ended(), launched.errors


def test_what_only_ray_can_do_is_refused_without_it(tmp_path: Path) -> None:
    for option in ("--ray-address=x:1", "--working-dir=.", "--gpus-per-worker=1"):
        code, errors = mistake(tmp_path, option)
        assert code == 2
        assert errors == [f"ma-launch: {option.partition('=')[0]} needs --engine ray (see `ma-launch --help`)"]


def test_an_address_where_no_cluster_is_costs_a_line(tmp_path: Path) -> None:
    code, errors = mistake(tmp_path, "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert code == 1
    assert errors == ["ma-launch: there is no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused"]


def test_a_ray_client_is_refused(tmp_path: Path) -> None:
    code, errors = mistake(tmp_path, "--engine", "ray", "--ray-address", "ray://127.0.0.1:1")
    assert code == 1
    assert errors[-1].startswith("ma-launch: ray://127.0.0.1:1: a Ray client cannot do this; start ma-launch on a node")


def test_a_script_outside_of_the_working_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code, errors = mistake(tmp_path, "--engine", "ray", "--working-dir", "elsewhere")
    assert code == 2
    assert errors == ["ma-launch: SCRIPT: 'script.py' is not in --working-dir 'elsewhere' (see `ma-launch --help`)"]


def test_without_ray_there_is_one_line_that_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from ps_worker.launch import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "script.py").write_text("")
    with Launched(["-c", code, "--engine", "ray", "--", "script.py"], cwd=tmp_path) as launched:
        assert launched.ended() == 1
        assert launched.errors == ["ma-launch: ray not installed; run: pip install 'torch-model-average[ray]'"]
