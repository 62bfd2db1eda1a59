"""ma-launch with scripts: what the workers get, and how a run ends, whatever ends it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ps_worker.engines.engine import EngineError
from ps_worker.engines.local_cluster import automatic_servers, center_directories, started_again, usable_cores
from tests.launched import Launched, all_gone, said
from tests.long_plays import long_except

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")

LAUNCH = ("-m", "ps_worker.launch")
# A worker that has failed starts again soon.
IMPATIENT = (
    "-c",
    "import sys; from ps_worker.engines import local_worker; from ps_worker.launch import main\n"
    "local_worker._FIRST_PAUSE_S = 0.125; sys.exit(main())",
)
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
# Worker 1 ignores SIGTERM; worker 0 has started a child process.
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


# Every process of worker 1 except the last one ends with an error.
FAILING_AT_FIRST = """
import os, sys
from pathlib import Path
from ma_client import ClusterSpec
cluster = ClusterSpec.from_env()
starts = Path(sys.argv[1]) / cluster.worker_id
with starts.open("a") as file:
    file.write("x")
print(cluster.worker_id, "starts", len(starts.read_text()), os.environ.get("MA_FRESH"))
if cluster.task_index == 1 and len(starts.read_text()) <= int(sys.argv[2]):
    raise ValueError("the disk is full of cats")
"""
# Worker 1 ends after one round with exit code 0 and without a goodbye; worker 0 goes on.
LEAVING = """
import os
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
session = ParameterServerSession.from_env()
if session.is_chief:
    session.initialize({"w": np.zeros(3, np.float32)})
session.pull()
session.push_and_average({"w": np.ones(3, np.float32)})
if not session.is_chief:
    os._exit(0)
session.push_and_average({"w": np.ones(3, np.float32)})
"""
CHIEF_LEAVES = """
from ma_client import ClusterSpec, ParameterServerSession
if ClusterSpec.from_env().task_index:
    ParameterServerSession.from_env().pull()
"""
NEVER_COMES = """
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
if ClusterSpec.from_env().task_index == 0:
    session = ParameterServerSession.from_env()
    session.initialize({"w": np.zeros(3, np.float32)})
    session.pull()
    session.push_and_average({"w": np.ones(3, np.float32)})
"""
# Worker 2 ends with an error; the others make a round without it.
QUORUM = """
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
if ClusterSpec.from_env().task_index == 2:
    raise SystemExit(3)
with ParameterServerSession.from_env() as session:
    if session.is_chief:
        session.initialize({"w": np.zeros(3, np.float32)})
    session.pull()
    print("contributors", session.push_and_average({"w": np.ones(3, np.float32)}).contributors)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch(SCRIPT TEXT, *ARGS, ps=K, workers=N, flags=[...], read_lines=N, program=LAUNCH) -> a running ma-launch.

    It serves no page unless told to: half a second of processor time."""
    running: list[Launched] = []

    def start(
        text: str,
        *args: str,
        ps: str = "1",
        workers: int = 2,
        flags: Sequence[str] = (),
        read_lines: int | None = None,
        program: Sequence[str] = LAUNCH,
        has_page: bool = False,
    ) -> Launched:
        script = tmp_path / "script.py"
        script.write_text(text)
        own = ["--ps", ps, "--workers", str(workers), "--runs", str(tmp_path / "runs"), *flags]
        own += [] if has_page else ["--no-page"]
        command = [*program, *own, "--", str(script), *args]
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
    *errors, happened = said(launched)
    assert sorted(errors) == [f"[worker-{i}] to stderr" for i in range(3)]
    assert re.fullmatch(
        r"ma-launch: no center was initialized, in \d+\.\d s; worker-0, worker-1 and worker-2 ended with exit code 0",
        happened,
    )
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
    assert said(launched) == [
        f"ma-launch: argument --ps: {ps!r} is not a whole number from 1 up or 'auto' (see `ma-launch --help`)"
    ]


@pytest.mark.parametrize("ps", long_except(["2"], ["1", "2"]))
def test_workers_of_a_script_average_through_the_servers(launch: Launch, ps: str) -> None:
    launched = launch(AVERAGE, ps=ps, has_page=True)
    assert launched.ended() == 0, launched.printed()
    assert sorted(launched.lines) == [f"[worker-{i}] center [0.5 0.5 0.5]" for i in range(2)]
    assert re.match(r"ma-launch: 1 round, global_step 1, in [\d.]+ s; worker-0 and worker-1 ", launched.errors[-1])


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
    happened, last = said(launched)
    assert re.fullmatch(
        r"ma-launch: no center was initialized, in [\d.]+ s; worker-0 and worker-1 were at work", happened
    )
    assert last == "ma-launch: parameter server ps-1 was ended by SIGKILL"
    assert_nothing_left(launched)


def test_workers_that_print_nothing_for_2_s_are_mentioned_once(launch: Launch) -> None:
    launched = launch(WAITING.replace('print("waiting")', ""))
    launched.wait_for("ma-launch: 2 workers have started and printed nothing yet (2 s so far)")
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended() == 130
    assert len([line for line in launched.errors if "printed nothing yet" in line]) == 1


def test_ctrl_c_ends_every_process_within_5_s(launch: Launch) -> None:
    launched = launch(STUBBORN)
    launched.wait_for("[worker-0] waiting", "[worker-1] waiting", "[worker-0] grandchild")
    assert len(launched.descendants()) == 4
    started_at_s = time.monotonic()
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended() == 130
    assert time.monotonic() - started_at_s < 5
    happened, last = said(launched)
    assert happened.endswith("worker-0 and worker-1 were at work")
    assert last == "ma-launch: ended by SIGINT, and every process with it"
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
    assert said(launched) == []
    assert_nothing_left(launched)


# Workers that end before the others, and workers that start again


def test_a_worker_that_fails_is_started_again_as_often_as_it_may_with_a_growing_pause(
    launch: Launch, tmp_path: Path
) -> None:
    launched = launch(FAILING_AT_FIRST, str(tmp_path), "2", flags=["--max-restarts", "2"], program=IMPATIENT)
    assert launched.ended() == 0, launched.printed()
    assert [line for line in launched.lines if "worker-1" in line] == [
        f"[worker-1] worker-1 starts {number} None" for number in (1, 2, 3)
    ]
    said = [line for line in launched.errors if "(restart" in line]
    assert said == [
        "ma-launch: worker-1 ended with exit code 1 (restart 1 of 2); it starts again in 0.125 s",
        "ma-launch: worker-1 ended with exit code 1 (restart 2 of 2); it starts again in 0.25 s",
    ]
    assert launched.errors[-1].endswith("; worker-0 and worker-1 (2 restarts) ended with exit code 0")
    assert_nothing_left(launched)


def test_a_worker_that_fails_once_too_often_ends_the_run(launch: Launch, tmp_path: Path) -> None:
    launched = launch(FAILING_AT_FIRST, str(tmp_path), "9", flags=["--max-restarts", "1"], program=IMPATIENT)
    assert launched.ended() == 1
    assert "ma-launch: worker-1 ended with exit code 1 (1 restart); its last lines:" in launched.errors
    assert launched.errors[-1] == "  ValueError: the disk is full of cats"
    assert_nothing_left(launched)


def test_a_killed_worker_that_is_started_again_takes_its_place(launch: Launch) -> None:
    launched = launch(WAITING, workers=1, flags=["--max-restarts", "1"], program=IMPATIENT)
    launched.wait_for("[worker-0] waiting")
    os.kill(max(launched.descendants("script.py")), signal.SIGKILL)
    launched.wait_for("worker-0 was ended by SIGKILL (restart 1 of 1)")
    launched.wait_for("[worker-0] waiting")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.ended() == 143
    assert_nothing_left(launched)


def test_ctrl_c_while_a_worker_is_about_to_start_again_ends_the_run(launch: Launch, tmp_path: Path) -> None:
    launched = launch(FAILING_AT_FIRST, str(tmp_path), "9", flags=["--max-restarts", "9"])
    launched.wait_for("(restart 2 of 9)")
    launched.process.send_signal(signal.SIGINT)
    assert launched.ended(timeout_s=10) == 130
    assert launched.errors[-1] == "ma-launch: ended by SIGINT, and every process with it"
    assert_nothing_left(launched)


def test_only_the_first_process_of_a_worker_is_told_that_the_center_must_be_new() -> None:
    assert started_again({"MA_FRESH": "1", "MA_TASK_INDEX": "0"}) == {"MA_TASK_INDEX": "0"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(
            LEAVING, "worker-1 ended (exit code 0) while worker-0 waits for it at the barrier", marks=pytest.mark.long
        ),
        (NEVER_COMES, "worker-1 ended (exit code 0) while worker-0 waits for it at the barrier"),
        (CHIEF_LEAVES, "worker-0 ended (exit code 0) without having initialized the center; worker-1 waits for that"),
    ],
    ids=["after a round", "before the first", "the chief"],
)
def test_a_worker_that_has_ended_while_others_wait_for_it_is_named(launch: Launch, text: str, said: str) -> None:
    launched = launch(text)
    launched.wait_for(f"ma-launch: {said}")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.ended() == 143
    assert_nothing_left(launched)


def test_with_a_quorum_rounds_go_on_without_a_worker_that_fails_and_the_run_says_so(launch: Launch) -> None:
    launched = launch(QUORUM, workers=3, flags=["--min-workers", "2", "--grace-s", "0.2"])
    assert launched.ended() == 1
    assert sorted(launched.lines) == [f"[worker-{i}] contributors ('worker-0', 'worker-1')" for i in range(2)]
    assert "ma-launch: worker-2 ended with exit code 3; rounds go on without it (--min-workers 2)" in launched.errors
    assert launched.errors[-1] == "ma-launch: worker-2 ended with exit code 3"


def test_a_run_goes_on_from_the_center_that_the_last_one_has_left(launch: Launch, tmp_path: Path) -> None:
    center = tmp_path / "center"
    flags = ["--checkpoint-dir", str(center), "--checkpoint-every-rounds", "5"]
    for step in (1, 2):
        launched = launch(AVERAGE, ps="2", flags=flags)
        assert launched.ended() == 0, launched.printed()
        assert f"1 round, global_step {step}, in" in launched.errors[-1]
        assert launched.errors[-1].endswith(f"; the center is in {center / 'ps-0'} {center / 'ps-1'}")
    assert {path.name for path in center.iterdir()} == {"ps-0", "ps-1"}


def test_another_number_of_servers_than_has_left_a_center_is_refused(tmp_path: Path) -> None:
    assert center_directories(None, 3) == ()
    assert center_directories(tmp_path / "new", 1) == (tmp_path / "new",)
    assert center_directories(tmp_path, 2) == (tmp_path / "ps-0", tmp_path / "ps-1")
    for name in ("ps-0", "ps-1"):
        (tmp_path / name).mkdir()
    assert center_directories(tmp_path, 2) == (tmp_path / "ps-0", tmp_path / "ps-1")
    for number in (1, 3):
        with pytest.raises(EngineError, match="has the center of 2 servers: give --ps 2 to go on with it"):
            center_directories(tmp_path, number)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "center-00000000000000000012.fresh.safetensors").touch()
    with pytest.raises(EngineError, match="has the center of 1 server: give --ps 1"):
        center_directories(tmp_path / "one", 2)
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"--checkpoint-dir .*file: Not a directory"):
        center_directories(tmp_path / "file", 1)
