"""A worker, the chief or the server is killed: where the original hangs, counts twice or starts over, and what this
project does instead."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelaverage.v1 import parameter_server_pb2 as pb
from tests.long_plays import long_except
from tests.raw_client import until
from tests.tensorflow_faults.cluster import (
    ADDED,
    INITIAL,
    INITIAL_OF_RESTARTED,
    OF_0_AND_1,
    OF_ALL,
    Cluster,
    common,
    push_all,
    refused_as_ahead,
    round_of,
    value_of,
)
from tests.worker_process import TIMEOUT_S, WorkerError

# A worker is killed before the barrier.


def test_a_worker_killed_before_the_barrier_is_waited_for_by_name_until_it_comes_back(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    workers[2].kill()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    cluster.waits(0, 1)
    status = cluster.client.status()
    assert (status.phase, status.global_step) == (pb.PHASE_AVERAGING, 1)
    assert (list(status.waiting_for), status.waiting_for_unknown) == (["worker-2"], 0)
    shown = subprocess.run(
        [sys.executable, "-m", "ps_server", "status", cluster.server.address],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "\nwaiting for  worker-2 (for " in shown.stdout
    known = r"'worker-2' \(last heard from \d+ s ago\)$"
    assert re.search(rf"round 1 has waited [5-9] s for {known}", cluster.server.logged("has waited"))
    for worker in workers[:2]:
        assert re.match(rf"the round has waited [5-9] s for {known}", worker.logged("has waited"))
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (15, 1)
    workers[2].begin_push(ADDED[2])
    assert common([worker.pushed() for worker in workers], range(3)) == (15 + OF_ALL, 2)


GRACE_S = 1.5


@pytest.mark.parametrize("fragments", long_except([20], [0, 20]))
def test_with_a_quorum_a_killed_worker_costs_one_grace_period(cluster: Cluster, fragments: int) -> None:
    cluster.serve(3, "--min-workers", "2", "--grace-s", str(GRACE_S))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    if fragments:
        workers[2].begin_push(ADDED[2], hold_after=fragments)
        cluster.given(2, fragments)
    workers[2].kill()

    began_at_s = time.monotonic()
    assert common(push_all(workers[:2]), range(2)) == (15 + OF_0_AND_1, 2)
    assert GRACE_S <= time.monotonic() - began_at_s < GRACE_S + 2

    began_at_s = time.monotonic()
    assert common(push_all(workers[:2]), range(2)) == (24 + OF_0_AND_1, 3)
    assert time.monotonic() - began_at_s < GRACE_S
    status = cluster.client.status()
    assert (status.rounds_without_all, status.rounds_restarted) == (2, 1 if fragments else 0)

    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (33, 3)
    workers[2].begin_push(ADDED[2])
    cluster.waits(2)
    for worker, added in zip(workers[:2], ADDED, strict=False):
        worker.begin_push(added)
    assert common([worker.pushed() for worker in workers], range(3)) == (33 + OF_ALL, 4)


def test_with_a_quorum_a_worker_that_closes_its_session_costs_nothing(cluster: Cluster) -> None:
    grace_s = 10.0
    cluster.serve(3, "--min-workers", "2", "--grace-s", str(grace_s))
    workers = cluster.start(3)
    assert round_of(workers) == (15, 1)
    began_at_s = time.monotonic()
    workers[2].ask("close")
    assert workers[2].end() == 0
    assert common(push_all(workers[:2]), range(2)) == (15 + OF_0_AND_1, 2)
    assert time.monotonic() - began_at_s < grace_s

    # It comes back, and goes while the others wait for it.
    workers[2], *_ = cluster.restart(2)
    workers[2].begin_push(ADDED[2])
    cluster.waits(2)
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    assert common([worker.pushed() for worker in workers], range(3)) == (24 + OF_ALL, 3)
    began_at_s = time.monotonic()
    for index in (0, 1):
        workers[index].begin_push(ADDED[index])
    cluster.waits(0, 1)
    assert list(cluster.client.status().waiting_for) == ["worker-2"]
    workers[2].ask("close")
    assert common([worker.pushed() for worker in workers[:2]], range(2)) == (38 + OF_0_AND_1, 4)
    assert time.monotonic() - began_at_s < grace_s


# It restarts.


def test_a_worker_that_restarts_goes_on_from_the_center_and_not_from_its_initial_values(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[1].kill()
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    (workers[1],) = cluster.join(1, initial=[INITIAL_OF_RESTARTED] * 2)
    assert value_of(workers[1].local()) == INITIAL_OF_RESTARTED
    with pytest.raises(WorkerError, match="pull the center") as refused:
        workers[1].push()
    assert (refused.value.kind, refused.value.reason) == ("NotInitializedError", "NOT_INITIALIZED")
    assert cluster.client.worker("worker-1").fragments_given == 0
    center, step = workers[1].start()
    assert (value_of(center), step) == (10, 1)
    workers[1].begin_push(ADDED[1])
    assert common([worker.pushed() for worker in workers], range(2)) == (10 + OF_0_AND_1, 2)


# It had pushed, dies, restarts and pushes again.


def test_a_worker_that_had_pushed_dies_and_pushes_again_is_counted_once(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    workers[0].begin_push(ADDED[0])
    workers[2].begin_push(ADDED[2])
    cluster.waits(0, 2)
    workers[2].kill()
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (1, 0)
    for _ in range(3):
        workers[2].ask("train", by=600)
    workers[2].begin_push()
    until(lambda: cluster.client.worker("worker-2").local_step == 3, "the second push is there")
    status = cluster.client.status()
    assert (status.global_step, list(status.waiting_for)) == (0, ["worker-1"])
    workers[1].begin_push(ADDED[1])
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(3)) == (1 + OF_ALL, 1)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED", "COMMITTED", "ALREADY_COUNTED"]
    assert [worker.pushes_counted for worker in cluster.client.status().workers] == [1, 1, 1]
    assert round_of(workers) == (15 + OF_ALL, 2)


def test_of_a_worker_that_dies_in_the_middle_of_its_push_only_the_next_whole_push_counts(cluster: Cluster) -> None:
    cluster.serve(3)
    workers = cluster.start(3)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    workers[2].begin_push(600, hold_after=20)
    cluster.given(2, 20)
    workers[2].kill()
    workers[2], center, step = cluster.restart(2)
    assert (center, step) == (1, 0)
    workers[2].begin_push(ADDED[2])
    cluster.waits(0, 2)
    workers[1].begin_push(ADDED[1])
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(3)) == (1 + OF_ALL, 1)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 3
    assert cluster.client.status().rounds_restarted == 1


# It had pushed and died, the round committed, it restarts.


def test_a_worker_that_died_after_its_push_joins_the_round_in_progress(cluster: Cluster) -> None:
    cluster.serve(3)
    workers, expected = cluster.start(3), INITIAL[0]
    for dies, (waits, comes_last) in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        # The round that it has pushed to commits without it.
        workers[dies].begin_push(ADDED[dies])
        cluster.waits(dies)
        workers[dies].kill()
        for index in (waits, comes_last):
            workers[index].begin_push(ADDED[index])
        pushes = [workers[index].pushed() for index in (waits, comes_last)]
        step = pushes[0].global_step
        expected += OF_ALL
        assert common(pushes, range(3)) == (expected, step)
        # The next round is in progress when it comes back.
        workers[waits].begin_push(ADDED[waits])
        cluster.waits(waits)
        workers[dies], *pulled = cluster.restart(dies)
        assert pulled == [expected, step]
        workers[dies].begin_push(ADDED[dies])
        cluster.waits(dies)
        assert cluster.client.status().global_step == step
        workers[comes_last].begin_push(ADDED[comes_last])
        pushes = [worker.pushed() for worker in workers]
        expected += OF_ALL
        assert common(pushes, range(3)) == (expected, step + 1)
        assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 3
    assert cluster.client.status().global_step == 6


# The chief is killed.


@pytest.mark.parametrize("is_chief", long_except([True], [True, False]))
def test_a_killed_chief_joins_again_like_any_worker(cluster: Cluster, is_chief: bool) -> None:
    cluster.serve(2)
    workers = cluster.start(2, initial_step=5)
    assert round_of(workers) == (10, 6)
    workers[0].kill()
    workers[1].begin_push(ADDED[1])
    cluster.waits(1)
    assert list(cluster.client.status().waiting_for) == ["worker-0"]
    workers[0], center, step = cluster.restart(0, is_chief=is_chief)
    assert (center, step) == (10, 6)
    workers[0].begin_push(ADDED[0])
    assert common([worker.pushed() for worker in workers], range(2)) == (10 + OF_0_AND_1, 7)
    assert round_of(workers) == (19 + OF_0_AND_1, 8)


# The server is killed.


def test_a_killed_server_comes_back_with_its_center_and_the_round_completes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.serve(2, "--checkpoint-dir", str(tmp_path))
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    cluster.server.kill()
    workers[1].begin_push(ADDED[1])
    for worker in workers:
        assert "trying again for up to 60 s" in worker.logged(cluster.server.address)
    cluster.serve_again()
    pushes = [worker.pushed() for worker in workers]
    assert common(pushes, range(2)) == (10 + OF_0_AND_1, 2)
    assert [pushed.outcome for pushed in pushes] == ["COMMITTED"] * 2
    assert "global_step 1" in cluster.server.logged("continuing from checkpoint")

    # Server and chief die together.
    for process in (cluster.server, workers[0]):
        process.kill()
    cluster.serve_again()
    workers[0], center, step = cluster.restart(0)
    assert (center, step) == (19, 2)
    assert round_of(workers) == (19 + OF_0_AND_1, 3)


def test_a_server_that_lost_its_center_is_an_error_and_never_a_start_from_initial_values(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = cluster.start(2)
    assert round_of(workers) == (10, 1)
    workers[0].begin_push(ADDED[0])
    cluster.waits(0)
    cluster.server.kill()
    cluster.serve_again()
    workers[1].begin_push(ADDED[1])
    for worker, added in zip(workers, ADDED, strict=False):
        with pytest.raises(WorkerError, match=r"has lost the center variables .* --checkpoint-dir") as lost:
            worker.pushed()
        assert (lost.value.kind, lost.value.reason) == ("NotInitializedError", "NOT_INITIALIZED")
        assert value_of(worker.local()) == 10 + added
    assert cluster.client.status().phase == pb.PHASE_UNINITIALIZED

    # A restarted chief begins a new job. Workers of the old job are told so, in any order of arrival.
    workers[0].kill()
    workers[0], center, step = cluster.restart(0)
    assert (center, step) == (INITIAL_OF_RESTARTED, 0)
    workers[1].begin_push()
    cluster.waits(1)
    workers[0].begin_push(ADDED[0])
    refused_as_ahead(workers[1])
    cluster.waits(0)
    workers[1].begin_push()
    refused_as_ahead(workers[1])
    assert value_of(workers[1].local()) == 10 + ADDED[1]
    assert cluster.client.status().global_step == 0
