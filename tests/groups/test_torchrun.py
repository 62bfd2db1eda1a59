"""examples/group.py, as its reader starts it: the processes that torchrun has started on a machine are one worker."""

from __future__ import annotations

import contextlib
import sys

import pytest

from ma_client import ParameterServerSession
from tests.groups.torchrun import kill_rank, torchrun
from tests.launched import Launched
from tests.ports import lasting_port
from tests.test_server_process import ServerProcess

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
TIMEOUT_S = 120
ROUNDS = 12


def ended(address: str, *workers: Launched) -> None:
    """Checks that all workers have trained to the end, and printed the same accuracy of the center."""
    for worker in workers:
        assert worker.ended(TIMEOUT_S) == 0, worker.printed()
        assert worker.descendants() == []
    accuracies = {worker.lines[-1] for worker in workers}
    assert len(accuracies) == 1
    assert float(accuracies.pop().split()[-1]) > 0.95
    with ParameterServerSession([address], worker_id="reader") as reader:
        assert reader.status().global_step == ROUNDS


def test_every_node_of_a_torchrun_job_is_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MA_WORKER_PER", "node")
    with ServerProcess(num_workers=2) as server, contextlib.ExitStack() as workers:
        port = lasting_port()
        two = [
            workers.enter_context(
                torchrun(
                    None,
                    server.address,
                    "examples/group.py",
                    "--shard",
                    flags=("--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                )
            )
            for node in range(2)
        ]
        ended(server.address, *two)


def test_groups_of_which_ranks_were_killed_are_restarted_and_take_their_places() -> None:
    with ServerProcess(num_workers=2) as server, contextlib.ExitStack() as workers:
        flags = ("--standalone", "--max-restarts=5", "--monitor-interval=0.1")
        two = [
            workers.enter_context(torchrun(index, server.address, "examples/group.py", flags=flags))
            for index in range(2)
        ]
        two[1].wait_for("round 4")
        kill_rank(two[1], 0)
        two[1].wait_for("round 8")
        kill_rank(two[1], 1)
        ended(server.address, *two)
        # The other worker has waited; no round is missing, and none was made twice.
        assert [line.split(":")[0] for line in two[0].lines[:-1]] == [f"round {n}" for n in range(1, ROUNDS + 1)]
