"""Initial values, steps and shapes that differ, and rounds that take too long: what the original does with them, and
what this project does instead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.long_plays import long_except
from tests.raw_client import until
from tests.tensorflow_faults.cluster import (
    ADDED,
    INITIAL,
    OF_0_AND_1,
    OF_ALL,
    SHAPES,
    Cluster,
    common,
    mismatch,
    refused_as_ahead,
    round_of,
    value_of,
)
from tests.worker_process import WorkerError, WorkerProcess

# Different initial values.


def test_workers_with_different_initial_values_all_start_from_the_chiefs(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.join(0, 1, 2)
    for worker in workers[1:]:
        worker.send("start")
    until(lambda: len(cluster.client.status().workers) == 2, "two wait for the chief")
    center, step = workers[0].start()
    assert (value_of(center), step) == (INITIAL[0], 0)
    for worker in workers[1:]:
        worker.answer()
    assert [value_of(worker.local()) for worker in workers] == [INITIAL[0]] * 3
    assert round_of(workers) == (INITIAL[0] + OF_ALL, 1)


# global_step.


def test_global_step_counts_committed_rounds_only(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2, initial_step=5)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    assert cluster.client.status().global_step == 5
    # All but one fragment is there when the round starts over.
    workers[1].begin_push(600, hold_after=45)
    cluster.given(1, 45)
    assert cluster.client.status().global_step == cluster.client.pull()[0].global_step == 5
    workers[1].kill()
    workers[1], *pulled = cluster.restart(1)
    assert pulled == [1, 5]
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (1 + OF_0_AND_1, 6)
    assert cluster.client.status().global_step == 6
    assert cluster.client.pull()[0].global_step == 6


# Pushes from the past and from the future.


def test_a_stale_push_gets_the_center_and_leaves_the_round_whole(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(3)
    assert round_of(workers[:2]) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    stale = workers[2].push(600)
    assert (stale.outcome, stale.global_step, value_of(stale.center)) == ("STALE", 1, 10)
    status = cluster.client.status()
    assert (status.stale_pushes, status.rounds_restarted, status.global_step) == (1, 0, 1)
    assert [worker.waiting for worker in status.workers] == [True, False, False]
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers[:2]], range(2)) == (10 + OF_0_AND_1, 2)

    # It goes on from the center that it got: stale again, and then no longer.
    assert value_of(workers[2].local()) == 10
    again = workers[2].push(600)
    assert (again.outcome, value_of(again.center)) == ("STALE", 19)
    workers[2].begin_push(ADDED[2])
    workers[0].begin_push(ADDED[0])
    pushes = [workers[index].pushed() for index in (0, 2)]
    assert common(pushes, (0, 2)) == (19 + (ADDED[0] + ADDED[2]) / 2, 3)


def restored_from_an_older_checkpoint(cluster: Cluster, directory: Path) -> list[WorkerProcess]:
    """Workers at step 3, where the center is 28; a server at step 2, where it is 19."""
    cluster.serve(2, "--checkpoint-dir", str(directory), "--checkpoint-every-rounds", "2")
    workers = cluster.start(2)
    assert [round_of(workers) for _ in range(3)] == [(10, 1), (19, 2), (28, 3)]
    until(lambda: cluster.client.status().checkpoint_step == 2, "there is a checkpoint")
    cluster.server.kill()
    cluster.serve_again()
    assert cluster.client.status().global_step == 2
    return workers


def test_pushes_from_the_future_are_adopted_when_all_agree(cluster: Cluster, tmp_path: Path) -> None:
    workers = restored_from_an_older_checkpoint(cluster, tmp_path)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    assert cluster.client.status().global_step == 2
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (28 + OF_0_AND_1, 4)
    assert round_of(workers) == (37 + OF_0_AND_1, 5)


@pytest.mark.parametrize("comes_first", long_except([True], [True, False]))
def test_a_lone_push_from_the_future_is_refused(cluster: Cluster, tmp_path: Path, comes_first: bool) -> None:
    ahead, other = restored_from_an_older_checkpoint(cluster, tmp_path)
    other.kill()
    other, *pulled = cluster.restart(1)
    assert pulled == [19, 2]
    if comes_first:
        ahead.begin_push(600)
        cluster.waits(0)
        other.begin_push(ADDED[1])
        told = refused_as_ahead(ahead)
        assert told.startswith("others push from base step 3, 'worker-1' from 2, but the server is at global_step 2")
    else:
        other.begin_push(ADDED[1])
        cluster.waits(1)
        ahead.begin_push(600)
        told = refused_as_ahead(ahead)
        assert told.startswith("'worker-0' pushes from base step 3, but the server is at global_step 2")
    assert value_of(ahead.local()) == 28 + 600
    cluster.waits(1)
    center, step = ahead.start()
    assert (value_of(center), step) == (19, 2)
    ahead.begin_push(ADDED[0])
    assert common([ahead.pushed(), other.pushed()], range(2)) == (19 + OF_0_AND_1, 3)


# A round that takes too long.


def test_a_round_that_takes_too_long_is_an_error_that_names_the_missing_and_may_go_on(cluster: Cluster) -> None:
    timeout_s = 1.5
    cluster.serve(3, "--round-timeout-s", str(timeout_s))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    began_at_s = time.monotonic()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    for index in (0, 1):
        with pytest.raises(WorkerError) as late:
            workers[index].pushed()
        assert (late.value.kind, late.value.reason) == ("DeadlineExceededError", "ROUND_TIMED_OUT")
        assert str(late.value).startswith("round 1 waited 1.5 s (--round-timeout-s) for 'worker-2'; ")
        assert timeout_s <= time.monotonic() - began_at_s < timeout_s + 2
        assert value_of(workers[index].local()) == 15 + ADDED[index]
    assert cluster.client.status().global_step == 1
    workers[2].begin_push(ADDED[2])
    workers[1].begin_push()
    workers[0].begin_push()
    assert common([worker.pushed() for worker in workers], range(3)) == (15 + OF_ALL, 2)
    assert [worker.pushes_counted for worker in cluster.client.status().workers] == [2, 2, 2]


# Shapes that differ.


def test_shapes_that_differ_are_named_in_one_line_and_hold_nobody_up(cluster: Cluster) -> None:
    other = {**SHAPES, "layer3.weight": (9, 13)}
    cluster.serve(2)
    workers = cluster.start(2)
    (late,) = cluster.join(1, shapes=other)
    assert mismatch(late, "start") == (
        "variable 'layer3.weight' is float32[9, 13] here but float32[13, 9] in the center; "
        "give all workers the same model"
    )
    (chief,) = cluster.join(0, shapes=other)
    assert mismatch(chief, "start") == (
        "the center was initialized with another manifest: "
        "variable 'layer3.weight' is float32[9, 13] in the call but float32[13, 9] on the server; "
        "give all workers the same model"
    )
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    workers[1].ask("reshape", name="layer3.weight", shape=(117,))
    assert mismatch(workers[1], "push") == (
        "variable 'layer3.weight' is float32[117] here but float32[13, 9] in the center; "
        "give all workers the same model"
    )
    (workers[1],) = cluster.join(1)
    workers[1].start()
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (1 + OF_0_AND_1, 1)
