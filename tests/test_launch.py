"""ma-launch with scripts: what the workers get, and how a run ends, whatever ends it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ps_worker.local_cluster import automatic_servers, usable_cores
from tests.launched import Launched, all_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")

LAUNCH = ("-m", "ps_worker.launch")
Launch = Callable[..., Launched]

WHO = """
import sys
from ma_client import ClusterSpec
cluster = ClusterSpec.from_env()
print(cluster.worker_id, "of", cluster.num_workers, sys.argv[1:])
print("to stderr", file=sys.stderr)
"""
AVERAGE = """
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
with ParameterServerSession.from_env() as session:
    if session.is_chief:
        session.initialize({"w": np.zeros(3, np.float32)})
    session.pull()
    index = ClusterSpec.from_env().task_index
    print("center", session.push_and_average({"w": np.full(3, index, np.float32)}).center["w"])
"""
WAITING = """
import signal
print("waiting")
signal.pause()
"""
# Worker 1 does not want to go; worker 0 has started a process of its own.
STUBBORN = """
import signal, subprocess, sys
from ma_client import ClusterSpec
if ClusterSpec.from_env().task_index == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    child = subprocess.Popen([sys.executable, "-c", "import signal; print('grandchild', flush=True); signal.pause()"])
print("waiting")
while True:
    signal.pause()
"""
FAILING = """
import signal
from ma_client import ClusterSpec
if ClusterSpec.from_env().task_index == 1:
    raise ValueError("the disk is full of cats")
signal.pause()
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch(SCRIPT TEXT, *ARGS, ps=K, workers=N, read_lines=N) -> ma-launch at work on it."""
    running: list[Launched] = []

    def start(text: str, *args: str, ps: str = "1", workers: int = 2, read_lines: int | None = None) -> Launched:
        script = tmp_path / "script.py"
        script.write_text(text)
        command = [*LAUNCH, "--ps", ps, "--workers", str(workers), "--", str(script), *args]
        running.append(Launched(command, read_lines=read_lines))
        return running[-1]

    yield start
    for launched in running:
        launched.__exit__(None, None, None)


def assert_nothing_left(launched: Launched) -> None:
    assert launched.descendants() == []


def test_script_gets_its_arguments_and_its_place_in_the_cluster(launch: Launch) -> None:
    launched = launch(WHO, "--lr", "0.1", "--", "x", workers=3)
    assert launched.ended() == 0, launched.printed()
    arguments = ["--lr", "0.1", "--", "x"]
    assert sorted(launched.lines) == [f"[worker-{i}] worker-{i} of 3 {arguments}" for i in range(3)]
    assert sorted(launched.errors) == [f"[worker-{i}] to stderr" for i in range(3)]
    assert_nothing_left(launched)


def test_workers_get_the_addresses_of_all_servers_in_one_order(launch: Launch) -> None:
    launched = launch("import os\nprint(os.environ['MA_PS_HOSTS'])", ps="3", workers=2)
    assert launched.ended() == 0, launched.printed()
    (hosts,) = {line.split("] ")[1] for line in launched.lines}
    assert len(launched.lines) == 2
    assert len(set(hosts.split(","))) == 3
    assert all(host.startswith("127.0.0.1:") for host in hosts.split(","))
    assert_nothing_left(launched)


@pytest.mark.parametrize(
    ("num_workers", "cores", "servers"), [(1, 1, 1), (2, 2, 1), (2, 4, 1), (2, 6, 2), (2, 64, 2), (8, 16, 4), (8, 4, 1)]
)
def test_auto_gives_a_server_for_every_two_cores_that_the_workers_leave_up_to_their_number(
    num_workers: int, cores: int, servers: int
) -> None:
    assert automatic_servers(num_workers, cores) == servers


def test_ps_auto_starts_as_many_servers_as_the_rule_says(launch: Launch) -> None:
    launched = launch(WAITING, ps="auto", workers=1)
    launched.wait_for("[worker-0] waiting")
    assert len(launched.descendants("ps_server serve")) == automatic_servers(1, usable_cores())


@pytest.mark.parametrize("ps", ["0", "two"])
def test_a_number_of_servers_that_makes_no_sense_is_refused(launch: Launch, ps: str) -> None:
    launched = launch(WAITING, ps=ps)
    assert launched.ended() == 2
    assert launched.errors == [
        f"ma-launch: argument --ps: {ps!r} is not a whole number from 1 on, and not 'auto' (see `ma-launch --help`)"
    ]


@pytest.mark.parametrize("ps", ["1", "2"])
def test_workers_of_a_script_average_through_the_servers(launch: Launch, ps: str) -> None:
    launched = launch(AVERAGE, ps=ps)
    assert launched.ended() == 0, launched.printed()
    assert sorted(launched.lines) == [f"[worker-{i}] center [0.5 0.5 0.5]" for i in range(2)]


def test_failing_worker_ends_the_run_with_its_message(launch: Launch) -> None:
    launched = launch(FAILING)
    assert launched.ended() == 1
    report = launched.errors[launched.errors.index("ma-launch: worker-1 ended with exit code 1; its last lines:") :]
    assert report[-1] == "  ValueError: the disk is full of cats"
    assert_nothing_left(launched)


def test_killed_worker_ends_the_run_and_is_named(launch: Launch) -> None:
    launched = launch(WAITING)
    launched.wait_for("[worker-0] waiting", "[worker-1] waiting")
    os.kill(max(launched.descendants("script.py")), signal.SIGKILL)
    assert launched.ended() == 1
    assert launched.errors[-1].startswith("ma-launch: worker-")
    assert launched.errors[-1].endswith(" was ended by SIGKILL")
    assert_nothing_left(launched)


def test_one_dead_server_of_several_ends_the_run(launch: Launch) -> None:
    launched = launch(WAITING, ps="2")
    launched.wait_for("[worker-0] waiting", "[worker-1] waiting")
    _, second = sorted(launched.descendants("ps_server serve"))
    os.kill(second, signal.SIGKILL)
    assert launched.ended() == 1
    assert launched.errors == ["ma-launch: parameter server ps-1 was ended by SIGKILL"]
    assert_nothing_left(launched)


def test_ctrl_c_ends_every_process_within_5_s(launch: Launch) -> None:
    launched = launch(STUBBORN)
    launched.wait_for("[worker-0] waiting", "[worker-1] waiting", "[worker-0] grandchild")
    assert len(launched.descendants()) == 4
    started_at_s = time.monotonic()
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended() == 130
    assert time.monotonic() - started_at_s < 5
    assert launched.errors == ["ma-launch: ended by SIGINT, and every process with it"]
    assert_nothing_left(launched)


def test_second_ctrl_c_waits_for_nobody(launch: Launch) -> None:
    launched = launch(STUBBORN)
    launched.wait_for("[worker-1] waiting")
    started_at_s = time.monotonic()
    launched.process.send_signal(signal.SIGTERM)
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended() in (130, 143)
    assert time.monotonic() - started_at_s < 2.5
    assert_nothing_left(launched)


def test_killed_launcher_leaves_no_orphans(launch: Launch) -> None:
    launched = launch(WAITING)
    launched.wait_for("[worker-0] waiting", "[worker-1] waiting")
    orphans = launched.descendants()
    assert len(orphans) == 3
    launched.process.kill()
    assert all_gone(orphans, timeout_s=5)


def test_output_that_nobody_reads_any_more_ends_the_run(launch: Launch) -> None:
    launched = launch("import itertools\nfor number in itertools.count(): print(number)", read_lines=100)
    assert launched.ended() == 128 + signal.SIGPIPE
    assert launched.errors == []
    assert_nothing_left(launched)
