"""What ma-launch reports about workers that have ended: from hand-made statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.engines.engine import WorkerState
from ps_worker.watch.aftermath import missed, what_happened

RUNNING, ENDED = WorkerState("worker-0"), WorkerState("worker-1", 0)


def status(*waiting: str, **fields: object) -> pb.GetStatusResponse:
    found = pb.GetStatusResponse(phase=pb.PHASE_AVERAGING, global_step=7, rounds_committed=3)
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(found, name).extend(value)
        else:
            setattr(found, name, value)
    for name in waiting:
        found.workers.add(worker_id=name, waiting=True)
    return found


def test_a_worker_that_a_round_waits_for_is_missed_once_it_has_ended() -> None:
    now = status("worker-0", waiting_for=["worker-1"])
    (said,) = missed([now], [RUNNING, ENDED]).values()
    assert said.startswith("worker-1 ended (exit code 0) while worker-0 waits for it at the barrier")
    assert missed([now], [RUNNING, WorkerState("worker-1")]) == {}  # it still runs


def test_one_shard_that_waits_is_enough_and_all_who_wait_are_named() -> None:
    now = status("worker-0", "worker-2", waiting_for=["worker-1"])
    (said,) = missed([status(), now], [RUNNING, ENDED, WorkerState("worker-2")]).values()
    assert "while worker-0 and worker-2 wait for it" in said


def test_a_worker_that_the_server_never_heard_of_is_missed_too() -> None:
    assert missed([status("worker-0", waiting_for_unknown=1)], [RUNNING, ENDED]).keys() == {"worker-1"}


def test_nobody_is_missed_while_nobody_waits() -> None:
    assert missed([status(waiting_for=["worker-1"])], [RUNNING, ENDED]) == {}


def test_a_worker_that_has_finished_is_not_missed() -> None:
    now = status("worker-0", waiting_for=["worker-2"])
    now.workers.add(worker_id="worker-1", has_finished=True)
    assert missed([now], [RUNNING, ENDED, WorkerState("worker-2")]) == {}


def test_a_chief_that_ends_before_it_has_initialized_the_center_is_missed() -> None:
    now = pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)
    workers = [WorkerState("worker-0", -9), WorkerState("worker-1")]
    assert missed([now], workers) == {}  # the other worker may not use the server
    now.workers.add(worker_id="worker-1")
    (said,) = missed([now], workers).values()
    assert said.startswith("worker-0 was ended by SIGKILL without having initialized the center; worker-1 waits")


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([WorkerState("worker-0", 0), WorkerState("worker-1", 0)], "worker-0 and worker-1 finished"),
        (
            [WorkerState("worker-0", 0), WorkerState("worker-2", 0)],
            "worker-0 finished; worker-2 ended with exit code 0",
        ),
        ([WorkerState("worker-0", 0, 2)], "worker-0 (2 restarts) finished"),
        (
            [WorkerState("worker-0"), WorkerState("worker-2", -9, 1)],
            "was at work; worker-2 (1 restart) was ended by SIGKILL",
        ),
        ([WorkerState("worker-2", 1), WorkerState("worker-3", 1)], "worker-2 and worker-3 ended with exit code 1"),
        ([WorkerState(f"worker-{n}") for n in range(5, 30)], "worker-20 and 9 more were at work"),
    ],
)
def test_a_run_says_at_its_end_who_ended_how(states: list[WorkerState], words: str) -> None:
    now = status()
    for name in ("worker-0", "worker-1"):
        now.workers.add(worker_id=name, has_finished=True)
    happened = what_happened([now], states, 12.34)
    assert happened.startswith("3 rounds, global_step 7, in 12.3 s; ")
    assert happened.endswith(words)


def test_a_run_says_at_its_end_where_the_center_is() -> None:
    at = [Path("center/ps-0"), Path("center/ps-1")]
    behind = status(global_step=6, rounds_committed=2)
    happened = what_happened([status(), behind], [ENDED], 1.0, at)
    assert happened.startswith("2 rounds, global_step 6, ")
    assert happened.endswith("; the center is in center/ps-0 center/ps-1")
    nothing = pb.GetStatusResponse(phase=pb.PHASE_UNINITIALIZED)
    assert (
        what_happened([nothing], [ENDED], 1.0, at)
        == "no center was initialized, in 1.0 s; worker-1 ended with exit code 0"
    )
    assert what_happened([], [ENDED], 1.0, at).startswith("in 1.0 s; ")
