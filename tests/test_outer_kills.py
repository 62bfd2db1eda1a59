"""Servers and workers are killed at seeded moments: center and state stay those of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from ma_client import ParameterServerSession
from modelaverage.outer import OuterAdam, OuterOptimizer, OuterSGD, text_of
from tests.faults import RestartedServer, RestartedWorker, undisturbed
from tests.killed_worker import START
from tests.long_plays import long_except

WORKERS = 2
# More rounds than are made until the last kill: one after each, and those of the wait for the next.
ROUNDS_A_KILL, WAIT_S = 15, 0.01
OUTERS = (OuterSGD(0.7, 0.9, nesterov=True), OuterAdam(0.1))


@pytest.mark.parametrize(
    ("outer", "kills"), long_except([(OUTERS[0], 3)], [(OUTERS[0], 3), *((outer, 30) for outer in OUTERS)])
)
def test_kills_of_servers_and_workers_leave_center_and_state_those_of_an_undisturbed_run(
    outer: OuterOptimizer, kills: int, tmp_path: Path
) -> None:
    chance, rounds = random.Random(15), ROUNDS_A_KILL * (kills + 4)
    with RestartedServer(tmp_path, "--num-workers", str(WORKERS)) as server:
        workers = [
            RestartedWorker("tests.killed_worker", [server.address, str(index), str(rounds), text_of(outer)])
            for index in range(WORKERS)
        ]
        victims: list[RestartedServer | RestartedWorker] = [server, *workers] * (kills // (1 + WORKERS))
        chance.shuffle(victims)
        try:
            for victim in victims:
                for worker in workers:  # a worker that was killed makes a round, too
                    assert worker.made(worker.step + 1), "no round is made"
                time.sleep(chance.uniform(0.0, WAIT_S))  # at any moment of the rounds that follow
                victim.kill()
        finally:
            for worker in workers:
                worker.join()
        with ParameterServerSession([server.address], worker_id="reader") as session:
            center, step = session.pull(catch_up=False)
    assert server.ends == [-signal.SIGKILL] * victims.count(server)
    for worker in workers:
        assert worker.ends == [*[-signal.SIGKILL] * victims.count(worker), 0]
    assert step == rounds
    expected = undisturbed(START, WORKERS, rounds, outer=outer)
    assert {name: value.tobytes() for name, value in center.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }
