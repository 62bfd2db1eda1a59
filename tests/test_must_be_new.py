"""A chief that finds a center of an earlier run reports it and continues from it, or refuses if told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_client import ClusterError, ClusterSpec, ParameterServerSession
from modelaverage.errors import ConflictError
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from tests.conftest import StartServer

ZEROS, ONES = {"w": np.zeros(4, np.float32)}, {"w": np.ones(4, np.float32)}
REFUSED = r"the center must be new, but the parameter server at {} has one already, at global_step {}: .*--fresh"


def chief(*addresses: str, **options: Any) -> ParameterServerSession:
    return ParameterServerSession(addresses, worker_id="worker-0", is_chief=True, **options)


def earlier_run(*addresses: str, steps: int = 1) -> None:
    with chief(*addresses) as session:
        session.initialize(ZEROS)
        session.pull()
        for _ in range(steps):
            session.push_and_average(ZEROS)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ma_client"]


def test_a_chief_that_finds_a_center_says_where_it_goes_on(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    address = start_server(1).address
    with chief(address) as session:
        session.initialize(ZEROS)
    assert warnings_of(caplog) == []
    earlier_run(address, steps=2)
    caplog.clear()
    with chief(address) as session:
        assert not session.initialize(ONES).initialized
        session.initialize(ONES)
    assert warnings_of(caplog) == [
        "worker-0 continues from global_step 2 of the existing center; its own initial values are not used "
        "(with --fresh it would refuse)"
    ]


def test_it_says_so_of_a_file_too(start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.numpy import save_file

    address = start_server(1).address
    earlier_run(address)
    caplog.clear()
    save_file(ONES, tmp_path / "values")
    with chief(address, init_from=tmp_path / "values") as session:
        session.initialize(ZEROS)
    (line,) = warnings_of(caplog)
    assert f"; the values of {tmp_path / 'values'} are not used" in line


@pytest.mark.parametrize("servers", [1, 2])
def test_a_center_that_must_be_new_is_refused_if_there_is_one(start_server: StartServer, servers: int) -> None:
    addresses = [start_server(1).address for _ in range(servers)]
    with chief(*addresses, must_be_new=True) as session:
        assert session.initialize(ZEROS).initialized
        session.pull()
        session.push_and_average(ZEROS)
        session.initialize(ONES)  # its own center: no more than said
    for options in ({"must_be_new": True}, {}):
        with chief(*addresses, **options) as session:
            for _ in range(2):
                with pytest.raises(ConflictError, match=REFUSED.format(addresses[-1], 1)):
                    session.initialize(ONES, must_be_new=None if options else True)
            center, step = session.pull()
            assert (center["w"].tolist(), step) == ([0.0] * 4, 1)


def test_a_center_that_is_there_on_one_of_several_servers_is_refused(start_server: StartServer) -> None:
    addresses = [start_server(1).address for _ in range(2)]
    earlier_run(addresses[0])
    with chief(*addresses, must_be_new=True) as session:
        with pytest.raises(ConflictError, match=REFUSED.format(addresses[0], 1)):
            session.initialize(ONES)
        assert [status.phase for status in session.statuses()] == [pb.PHASE_IDLE, pb.PHASE_UNINITIALIZED]


def test_a_center_restored_from_a_checkpoint_is_no_new_one(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(1, checkpoints=CheckpointPolicy(tmp_path))
    earlier_run(server.address, steps=3)
    server.stop()
    address = start_server(1, checkpoints=CheckpointPolicy(tmp_path)).address
    refused = pytest.raises(ConflictError, match=REFUSED.format(address, 3))
    with chief(address, must_be_new=True) as session, refused:
        session.initialize(ONES)


class AnswerLost(ParameterServerSession):
    """The center is set between this session's look and its own attempt: by itself, if an answer was lost."""

    before = ZEROS
    step = 0

    def initialize(self, *args: Any, **options: Any) -> Any:
        (server,) = self._servers
        attempt = server.initialize

        def second_attempt(*there: Any) -> pb.InitializeResponse:
            with chief(*self.ps_hosts) as other:
                other.initialize(self.before, global_step=self.step)
            return attempt(*there)

        server.initialize = second_attempt  # type: ignore[assignment, method-assign]
        return super().initialize(*args, **options)


def test_a_new_center_whose_answer_was_lost_is_its_chiefs(start_server: StartServer) -> None:
    address = start_server(1).address
    with AnswerLost([address], worker_id="worker-0", is_chief=True, must_be_new=True) as session:
        assert session.initialize(ZEROS).initialized
        session.pull()
        assert session.push_and_average(ONES).global_step == 1


@pytest.mark.parametrize(("before", "step"), [(ONES, 0), (ZEROS, 7)])
def test_a_center_that_another_chief_sets_at_the_same_time_is_refused(
    start_server: StartServer, before: dict[str, Any], step: int
) -> None:
    address = start_server(1).address
    session = AnswerLost([address], worker_id="worker-0", is_chief=True, must_be_new=True)
    with session:
        session.before, session.step = before, step
        with pytest.raises(ConflictError, match=REFUSED.format(address, step)):
            session.initialize(ZEROS)


# Flags and the environment.

CLUSTER = {"MA_PS_HOSTS": "10.0.0.1:2222", "MA_NUM_WORKERS": "2", "MA_TASK_INDEX": "0"}


@pytest.mark.parametrize(("text", "fresh"), [("1", True), ("0", False), ("", False), (None, False)])
def test_ma_fresh_says_that_the_center_must_be_new(text: str | None, fresh: bool) -> None:
    environ = CLUSTER if text is None else {**CLUSTER, "MA_FRESH": text}
    assert ClusterSpec.from_env(environ).must_be_new is fresh
    assert ClusterSpec.resolve(environ, must_be_new=True).must_be_new


def test_anything_else_in_ma_fresh_is_refused() -> None:
    with pytest.raises(ClusterError, match="MA_FRESH='yes' is neither 1 nor 0"):
        ClusterSpec.from_env({**CLUSTER, "MA_FRESH": "yes"})


@pytest.mark.parametrize("task_index", [None, "auto"])
def test_it_travels_to_a_child(task_index: Any) -> None:
    cluster = {name: value for name, value in CLUSTER.items() if task_index is None or name != "MA_TASK_INDEX"}
    for environ, flag in (({**cluster, "MA_FRESH": "1"}, False), (cluster, True)):
        assert ClusterSpec.env_for_child(environ, task_index=task_index, must_be_new=flag)["MA_FRESH"] == "1"
    assert "MA_FRESH" not in ClusterSpec.env_for_child(CLUSTER)


SCRIPT = """\
import numpy as np
from ma_client import ParameterServerSession
with ParameterServerSession.from_env() as session:
    print(session.initialize({"w": np.ones(4, np.float32)}))
"""


def test_ps_worker_run_fresh_refuses_a_center_that_is_there(start_server: StartServer, tmp_path: Path) -> None:
    address = start_server(1).address
    (tmp_path / "train.py").write_text(SCRIPT)
    cluster = ("--ps-hosts", address, "--num-workers", "1", "--task-index", "0")
    command = [sys.executable, "-m", "ps_worker", "run", *cluster, "--fresh", str(tmp_path / "train.py")]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=60) for _ in range(2))
    assert "InitializeResult(initialized=True, global_step=0)" in first.stdout
    assert f"the center must be new, but the parameter server at {address} has one already" in second.stderr
    assert second.returncode == 1


def test_ma_launch_fresh_tells_the_chief(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("from ma_client import ClusterSpec\nprint(ClusterSpec.from_env().must_be_new)\n")
    for flags, said in ((["--fresh"], "True"), ([], "False")):
        command = [sys.executable, "-m", "ps_worker.launch", "--no-page", *flags, "--workers", "1"]
        command += ["--", str(tmp_path / "train.py")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == f"[worker-0] {said}\n"
