"""Cases: the calls of a worker's life, against a real server."""

from __future__ import annotations

import time

import numpy as np

from modelaverage.conformance import lines
from modelaverage.conformance.case import case
from modelaverage.conformance.miss import Miss, check
from modelaverage.conformance.models import average, fragments_of, like, mixed, vector
from modelaverage.conformance.stage import Stage
from modelaverage.conformance.worker import Worker, check_center, check_pushed

__all__: list[str] = []

_SOON_S = 5.0
# Long enough for a wrong answer to come; a correct client answers nothing meanwhile.
_SILENCE_S = 0.4


@case
def _two_workers_average_exactly(stage: Stage) -> None:
    address = stage.server(2).address
    workers = [stage.worker(address, name) for name in "ab"]
    workers[0].initialize(mixed())
    _rounds(workers, 3)


@case
def _three_workers_average_exactly(stage: Stage) -> None:
    address = stage.server(3).address
    workers = [stage.worker(address, name) for name in "abc"]
    workers[1].initialize(vector(50))
    _rounds(workers, 3)


def _rounds(workers: list[Worker], rounds: int) -> None:
    names = " ".join(worker.worker_id for worker in workers)
    center = [worker.pull().center for worker in workers][-1]
    for step in range(rounds):
        # Small integers: their sum is exact in any order.
        values = [
            {name: (value * 0 + 3 * number + step * step + 1).astype(value.dtype) for name, value in center.items()}
            for number, _ in enumerate(workers)
        ]
        for worker, local in zip(workers, values, strict=True):
            worker.begin_push(local)
        for worker in workers:
            check_pushed(worker.pushed(), "committed", step + 1, names, average(*values))


@case
def _one_worker_makes_100_rounds(stage: Stage) -> None:
    worker = stage.worker(stage.server().address)
    worker.initialize(vector(9))
    worker.pull()
    for step in range(100):
        local = vector(9, start=step)
        check_pushed(worker.push(local), "committed", step + 1, "a", local)


@case
def _shared_memory_may_be_offered(stage: Stage) -> None:
    server = stage.server(2, shared_memory=True)
    worker, peer = stage.worker(server.address), stage.peer(server.address)
    model = vector(300_000)
    peer.initialize(model, fragment_size_bytes=1 << 16)
    worker.pull()
    for step in range(2):
        mine, theirs = like(model, 1 + step), like(model, 11 + step)
        worker.begin_push(mine)
        peer.push(fragments_of(theirs, 1 << 16), step)
        check_pushed(worker.pushed(), "committed", step + 1, "a peer", average(mine, theirs))


@case
def _the_servers_outer_optimizer_makes_the_center(stage: Stage) -> None:
    address = stage.server().address
    worker, peer = stage.worker(address), stage.peer(address)
    peer.initialize(vector(9), outer_optimizer="sgd:lr=0.5,momentum=0.5")
    check("initialize", worker.initialize(vector(9)).by_this_call, False)
    check_center(worker.pull().center, vector(9))
    # From 0, on the average of 4: the first step goes half the way, the second has momentum; all values are exact.
    for step, moved in ((0, 2.0), (1, 4.0)):
        pushed = worker.push(vector(9, start=4))
        check_pushed(pushed, "committed", step + 1, "a", vector(9, start=moved))


@case
def _initializing_twice_changes_nothing(stage: Stage) -> None:
    address = stage.server().address
    first, second = stage.worker(address, "a"), stage.worker(address, "b")
    first.initialize(vector(9), 7)
    for worker in (first, second):
        again = worker.initialize(vector(9, start=100), 0, 32)
        check("initialize", (again.by_this_call, again.global_step), (False, 7))
    pulled = second.pull()
    check("global_step", pulled.global_step, 7)
    check_center(pulled.center, vector(9))


@case
def _initializing_a_large_model_again_ends_at_once(stage: Stage) -> None:
    address = stage.server().address
    large = vector(1 << 20)
    stage.peer(address).initialize(large, fragment_size_bytes=1 << 20)
    worker = stage.worker(address)
    check("initialize", worker.initialize(large, 0, 1 << 16).by_this_call, False)
    check("global_step", worker.pull().global_step, 0)


@case
def _another_manifest_is_a_mismatch(stage: Stage) -> None:
    address = stage.server().address
    stage.peer(address).initialize(vector(9))
    worker = stage.worker(address)
    for what, other in {
        "another shape": vector(10),
        "another type": vector(9, dtype=np.float64),
        "another name": {"v": np.arange(9, dtype=np.float32)},
        "one more": {**vector(9), "b": np.ones(1)},
    }.items():
        worker.send(_initialize(other))
        worker.fails("MANIFEST_MISMATCH", what=what)
    check_center(worker.pull().center, vector(9))


@case
def _an_invalid_manifest_is_refused(stage: Stage) -> None:
    address = stage.server().address
    worker = stage.worker(address)
    for what, line in {
        "fragments of 12 bytes": _initialize(vector(9), 12),
        "fragments of over 2 MiB": _initialize(vector(9), (2 << 20) + 8),
        "33 dimensions": _initialize({"w": np.ones((1,) * 33)}),
        "a name of 1025 bytes": _initialize({"n" * 1025: np.ones(1)}),
    }.items():
        worker.send(line)
        worker.fails("MANIFEST_INVALID", what=what)
    check("status", worker.status().phase, "uninitialized")
    worker.initialize(vector(9))
    check_center(worker.pull().center, vector(9))


@case
def _a_pull_before_the_chief_is_refused(stage: Stage) -> None:
    worker = stage.worker(stage.server().address)
    worker.send("pull now")
    worker.fails("NOT_INITIALIZED")
    worker.initialize(vector(9))
    check_center(worker.pull().center, vector(9))


@case
def _a_pull_may_wait_for_the_chief(stage: Stage) -> None:
    address = stage.server().address
    worker = stage.worker(address)
    worker.begin_pull(wait=True)
    worker.says_nothing(_SILENCE_S)
    stage.peer(address).initialize(mixed(), 5)
    pulled = worker.pulled()
    check("global_step", pulled.global_step, 5)
    check_center(pulled.center, mixed())


@case
def _the_status_tells_the_phase(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address)
    check("status", _status(worker), ("uninitialized", 0))
    peer.initialize(vector(9), 5)
    check("status", _status(worker), ("idle", 5))
    peer.begin_push(fragments_of(vector(9)), 5)
    stage.until_whole(peer, "peer")
    check("status", _status(worker), ("averaging", 5))


@case
def _a_push_from_an_old_step_is_stale(stage: Stage) -> None:
    address = stage.server(2, "--min-workers", "1", "--grace-s", "0.2").address
    worker, peer = stage.worker(address), stage.peer(address)
    peer.initialize(vector(9))
    worker.pull()
    worker.begin_push(vector(9))
    peer.push(fragments_of(vector(9)), 0)
    worker.pushed()
    # A round with a quorum commits without the client, which then pushes too late.
    alone = vector(9, start=7)
    check("the kit's own round", peer.push(fragments_of(alone), 1), 2)
    check_pushed(worker.push(vector(9, start=1000)), "stale", 2, "peer", alone)
    # Its base step is now that of the center that it received.
    worker.begin_push(vector(9, start=1))
    peer.push(fragments_of(vector(9, start=3)), 2)
    check_pushed(worker.pushed(), "committed", 3, "a peer", vector(9, start=2))


@case
def _a_quorum_does_not_wait_for_the_missing(stage: Stage) -> None:
    address = stage.server(2, "--min-workers", "1", "--grace-s", "0.2").address
    worker = stage.worker(address)
    worker.initialize(vector(9))
    worker.pull()
    check_pushed(worker.push(vector(9, start=4)), "committed", 1, "a", vector(9, start=4))


@case
def _a_worker_may_join_late(stage: Stage) -> None:
    address = stage.server(2, "--min-workers", "1", "--max-workers", "3", "--grace-s", "15").address
    early, peer = stage.worker(address, "a"), stage.peer(address)
    early.initialize(vector(9))
    early.pull()
    early.begin_push(vector(9, start=2))
    peer.push(fragments_of(vector(9)), 0)
    check_pushed(early.pushed(), "committed", 1, "a peer", vector(9, start=1))
    late = stage.worker(address, "late")
    pulled = late.pull(wait=True)
    check("global_step", pulled.global_step, 1)
    check_center(pulled.center, vector(9, start=1))
    late.begin_push(vector(9, start=6))
    stage.until_whole(peer, "late")
    early.begin_push(vector(9, start=3))
    peer.push(fragments_of(vector(9)), 1)
    for worker in (early, late):
        check_pushed(worker.pushed(), "committed", 2, "a late peer", vector(9, start=3))


@case
def _a_worker_that_leaves_is_not_waited_for(stage: Stage) -> None:
    address = stage.server(2, "--min-workers", "1", "--grace-s", "15").address
    worker, peer = stage.worker(address), stage.peer(address)
    worker.initialize(vector(9))
    worker.pull()
    worker.begin_push(vector(9))
    peer.push(fragments_of(vector(9)), 0)
    worker.pushed()
    worker.leave()
    began_s = time.monotonic()
    peer.push(fragments_of(vector(9)), 1)
    if time.monotonic() - began_s > _SOON_S:
        raise Miss("that a round does not wait for a worker that has left", "it waited for its grace period")


@case
def _a_worker_that_has_finished_is_not_waited_for(stage: Stage) -> None:
    address = stage.server(2).address
    worker, peer = stage.worker(address), stage.peer(address)
    worker.initialize(vector(9))
    worker.pull()
    worker.begin_push(vector(9))
    peer.push(fragments_of(vector(9)), 0)
    worker.pushed()
    worker.finish()
    check("workers that have finished", peer.status().workers_finished, 1)
    alone = vector(9, start=7)
    check("the kit's own round", peer.push(fragments_of(alone), 1), 2)
    # It continues training: rounds wait for it again.
    pulled = worker.pull()
    check("global_step", pulled.global_step, 2)
    check_center(pulled.center, alone)
    worker.begin_push(vector(9, start=1))
    stage.until_whole(peer, "a")
    check("workers that have finished", peer.status().workers_finished, 0)
    peer.push(fragments_of(vector(9, start=3)), 2)
    check_pushed(worker.pushed(), "committed", 3, "a peer", vector(9, start=2))


@case
def _a_worker_too_many_is_told(stage: Stage) -> None:
    address = stage.server(2).address
    worker, first, second = stage.worker(address), stage.peer(address, "first"), stage.peer(address, "second")
    fragments = fragments_of(vector(40))
    first.initialize(vector(40))
    worker.pull()
    first.begin_push(fragments, 0)
    second.begin_push(fragments, 0, give=1)
    stage.until(first, lambda status: status.waiting_for == ["second"], "both are in the round")
    worker.send(_push(vector(40)))
    worker.fails("ROUND_FULL")


@case
def _a_round_that_takes_too_long_is_told(stage: Stage) -> None:
    address = stage.server(2, "--round-timeout-s", "0.5").address
    worker, peer = stage.worker(address), stage.peer(address)
    peer.initialize(vector(9))
    worker.pull()
    worker.send(_push(vector(9, start=2)))
    worker.fails("ROUND_TIMED_OUT")
    # The push has stayed in the round, and is counted once.
    peer.push(fragments_of(vector(9)), 0)
    pushed = worker.push(vector(9, start=2))
    check("outcome", pushed.outcome in ("already_counted", "stale"), True)
    check("global_step", pushed.global_step, 1)
    check_center(pushed.center, vector(9, start=1))


def _initialize(arrays: lines.Arrays, fragment_size_bytes: int = 64) -> str:
    return lines.initialize_line(arrays, 0, fragment_size_bytes)


def _push(arrays: lines.Arrays) -> str:
    return lines.push_line(arrays)


def _status(worker: Worker) -> tuple[str, int]:
    status = worker.status()
    return status.phase, status.global_step
