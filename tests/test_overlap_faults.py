"""Servers and workers die while workers train during rounds: no round and no step is lost. Processes, SIGKILL."""

from __future__ import annotations

import itertools
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession
from tests.faults import HANG_S, RestartedServer, RestartedWorker
from tests.killed_server import BETWEEN_TWO_ANSWERS, MOMENTS
from tests.long_plays import long_except
from tests.optimizer.workers import QUIET_S
from tests.overlapped import (
    INTERVAL_STEPS,
    OVERLAP_STEPS,
    START,
    WHILE_IT_TRAINS,
    WORKER_MOMENTS,
    OverlappedTraining,
    after,
    without,
)
from tests.shard_faults import soon

WORKERS, ROUNDS = 2, 6
# How often a moment comes in a round of two workers, at least; each server has 3 fragments or more.
TIMES_A_ROUND = {"in the middle of the fragments": 6, "when a fragment is averaged": 3, BETWEEN_TWO_ANSWERS: 2}
FRAGMENTS_A_PUSH = 5

StartServers = Callable[..., list[RestartedServer]]


@pytest.fixture
def start_servers(tmp_path: Path) -> Iterator[StartServers]:
    """start_servers([option], ..., [option]) -> a server for each list of `RestartedServer` options."""
    with ExitStack() as running:

        def start(*options: dict[str, Any]) -> list[RestartedServer]:
            def one(index: int) -> RestartedServer:
                return RestartedServer(tmp_path / str(index), "--num-workers", str(WORKERS), **options[index])

            with ThreadPoolExecutor(len(options)) as threads:
                servers = list(threads.map(one, range(len(options))))
            for server in servers:
                running.enter_context(server)
            return servers

        yield start


def training_on(servers: list[RestartedServer]) -> OverlappedTraining:
    first, *others = [server.address for server in servers]
    return OverlappedTraining(first, START, WORKERS, ROUNDS, fragment_size_bytes=256, more_shards=others)


# A server dies.


@pytest.mark.parametrize(
    ("moment", "num_servers"),
    long_except(
        [("in the middle of the fragments", 1), (BETWEEN_TWO_ANSWERS, 2)],
        itertools.product([*MOMENTS, BETWEEN_TWO_ANSWERS], [1, 2]),
    ),
)
def test_a_server_killed_at_any_moment_costs_no_round_and_no_step_trained_meanwhile(
    start_servers: StartServers, moment: str, num_servers: int
) -> None:
    in_the_third_round = 2 * TIMES_A_ROUND.get(moment, 2 if "header" in moment else 1) + 1
    servers = start_servers({"deaths": ((moment, in_the_third_round),)}, *[{}] * (num_servers - 1))
    training = training_on(servers)
    training.check(training.run())
    assert servers[0].ends == [-signal.SIGKILL], f"the server never came to {moment!r}"
    assert training.meanwhile > 0


def test_training_waits_for_a_server_that_is_away_for_longer_than_the_overlap_and_loses_nothing(
    start_servers: StartServers,
) -> None:
    returns = threading.Event()
    (server,) = start_servers({"deaths": (("before the checkpoint", 4),), "returns": returns})
    training = training_on([server])
    pushed_twice = 3 * INTERVAL_STEPS  # the first checkpoint is that of the initial center
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(training.run)
        waiting = dict.fromkeys(range(WORKERS), pushed_twice + OVERLAP_STEPS - 1)
        assert soon(lambda: server.ends == [-signal.SIGKILL] and training.steps == waiting), training.steps
        time.sleep(QUIET_S)
        assert training.steps == waiting  # the next step is made, and waits
        assert training.rounds_made == 2
        returns.set()
        training.check(done.result(HANG_S))
    assert training.meanwhile >= WORKERS * (OVERLAP_STEPS - 1)


# A worker dies.


def told(servers: list[RestartedServer], worker: int, rounds: int, death: tuple[str, int] | None = None) -> list[str]:
    addresses = [server.address for server in servers]
    told = {"addresses": addresses, "worker": worker, "workers": WORKERS, "rounds": rounds, "death": death}
    return [json.dumps(told)]


def check_center(servers: list[RestartedServer], rounds: int, died_within_a_push: bool = False) -> None:
    """Checks that no round was lost and no push counted twice: the center is that of an undisturbed run, to the bit.

    Args:
        servers: of the job.
        rounds: how many there were.
        died_within_a_push: worker 0 died when some of several servers had all of its push. Then those have averaged it,
            and on the others it has abstained from that one round.
    """
    addresses = [server.address for server in servers]
    with ParameterServerSession(addresses, worker_id="reader") as session:
        center, step = session.pull(catch_up=False, timeout_s=HANG_S)
    assert step == rounds
    expected = after(START, WORKERS, rounds)
    allowed = [[expected]]
    if died_within_a_push and len(servers) > 1:
        allowed += [[expected, without(0, each, expected)] for each in range(rounds)]
    assert any(
        all(np.logical_or.reduce([center[name] == each[name] for each in some]).all() for name in expected)
        for some in allowed
    ), "the center differs"


@pytest.mark.parametrize(
    ("moment", "num_servers"),
    long_except([(WHILE_IT_TRAINS, 1)], itertools.product([*WORKER_MOMENTS, WHILE_IT_TRAINS], [1, 2])),
)
def test_a_worker_killed_at_any_moment_trains_again_what_it_had_not_pushed(
    start_servers: StartServers, moment: str, num_servers: int
) -> None:
    servers = start_servers(*[{}] * num_servers)
    death = (moment, {"in the middle of its fragments": 2 * FRAGMENTS_A_PUSH + 2, WHILE_IT_TRAINS: 2}.get(moment, 3))
    victim = RestartedWorker("tests.overlapped", told(servers, 0, ROUNDS, death), told(servers, 0, ROUNDS))
    other = RestartedWorker("tests.overlapped", told(servers, 1, ROUNDS))
    for worker in (victim, other):
        worker.join()
    assert (victim.ends, other.ends) == ([-signal.SIGKILL, 0], [0])
    check_center(servers, ROUNDS, died_within_a_push=True)


@pytest.mark.long
@pytest.mark.parametrize("num_servers", [1, 2])
def test_servers_and_workers_killed_again_and_again_cost_no_round(
    start_servers: StartServers, num_servers: int
) -> None:
    chance, kills, rounds = random.Random(num_servers), 12, 240
    servers = start_servers(*[{}] * num_servers)
    workers = [RestartedWorker("tests.overlapped", told(servers, index, rounds)) for index in range(WORKERS)]
    # With several servers, a worker that dies within a push may have to abstain from a round of some of them.
    mortal: list[RestartedServer | RestartedWorker] = [*servers, *(workers if num_servers == 1 else ())]
    victims = [chance.choice(mortal) for _ in range(kills)]
    try:
        for victim in victims:
            for worker in workers:  # a worker that was killed makes a round, too
                assert worker.made(worker.step + 1), "no round is made"
            time.sleep(chance.uniform(0.0, 0.02))  # at any moment of the rounds that follow
            victim.kill()
    finally:
        for worker in workers:
            worker.join()
    for server in servers:
        assert server.ends == [-signal.SIGKILL] * victims.count(server)
    for worker in workers:
        assert worker.ends == [*[-signal.SIGKILL] * victims.count(worker), 0]
    check_center(servers, rounds)
