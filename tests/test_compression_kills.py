"""Servers and workers of a job with a codec are killed at seeded moments: every center of a step has the same bits."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest

from ma_client import ParameterServerSession
from ps_server.flow.service import DEFAULT_SHARED_MEMORY_FROM_BYTES
from tests.compressed_worker import START, hash_of
from tests.faults import HANG_S, RestartedServer
from tests.long_plays import long_except
from tests.prepared import Prepared

WAIT_S = 0.02
STRICT, QUORUM = ("--num-workers", "3"), ("--num-workers", "4", "--min-workers", "2", "--max-workers", "6")


class Centers:
    """The hashes of the centers that were seen, by step."""

    def __init__(self) -> None:
        self.step = 0
        self.hashes = defaultdict[int, set[str]](set)
        self._news = threading.Condition()

    def add(self, line: str) -> None:
        """What a worker printed."""
        step, seen = line.split()
        with self._news:
            self.hashes[int(step)].add(seen)
            self.step = max(self.step, int(step))
            self._news.notify_all()

    def comes_to(self, step: int) -> None:
        """Waits until some worker has a center of this step."""
        with self._news:
            assert self._news.wait_for(lambda: self.step >= step, 4 * HANG_S), f"no round after {self.step}"


class Worker:
    """A worker's process, started again whenever it is killed."""

    def __init__(self, centers: Centers, **told: object) -> None:
        self.ends: list[int] = []
        self._centers = centers
        self._command = ("tests.compressed_worker", json.dumps(told))
        self._start()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        """Waits for its end; it may have been killed after its last round."""
        self._supervisor.join(4 * HANG_S)
        assert not self._supervisor.is_alive(), "a worker hangs"

    def _start(self) -> None:
        self._process = Prepared(*self._command)

    def _supervise(self) -> None:
        while True:
            with self._process.stdout as lines:
                for line in lines:
                    if line.endswith("\n"):
                        self._centers.add(line)
            self.ends.append(self._process.wait())
            if self.ends[-1] != -signal.SIGKILL:
                return
            self._start()


PLAYS = [
    (1, STRICT, "int8", ("shared", "data", "raw"), 16, 2),
    (1, STRICT, "int4", ("shared", "data", "raw"), 200, 30),
    (2, STRICT, "int8", ("messages", "data", "raw"), 200, 30),
    (3, STRICT, "bfloat16", ("shared", "data", "messages"), 200, 30),
    (1, QUORUM, "int4", ("shared", "data", "raw", "late"), 200, 30),
    (1, QUORUM, "int8", ("late", "messages", "data", "late"), 200, 30),
]


@pytest.mark.parametrize(("servers", "policy", "codec", "ways", "rounds", "kills"), long_except([PLAYS[0]], PLAYS))
def test_whatever_is_killed_all_hold_the_same_bits_after_every_round(
    servers: int,
    policy: tuple[str, ...],
    codec: str,
    ways: tuple[str, ...],
    rounds: int,
    kills: int,
    tmp_path: Path,
) -> None:
    assert sum(value.nbytes for value in START.values()) >= DEFAULT_SHARED_MEMORY_FROM_BYTES
    chance, centers = random.Random(16), Centers()
    with ExitStack() as running:
        shards = [running.enter_context(RestartedServer(tmp_path / str(number), *policy)) for number in range(servers)]
        addresses = [shard.address for shard in shards]

        def begin(number: int, way: str) -> Worker:
            return Worker(centers, addresses=addresses, worker=number, rounds=rounds, way=way, codec=codec)

        workers = [begin(number, way) for number, way in enumerate(ways)]
        try:
            for kill in range(kills):
                centers.comes_to(max(centers.step + 1, kill * (rounds - 5) // kills))
                time.sleep(chance.uniform(0.0, WAIT_S))  # at any moment of the round
                victims: list[RestartedServer | Worker] = [*shards, *workers]
                chance.choice(victims).kill()
                if policy is QUORUM and kill == kills // 2:  # a newcomer in the middle of the run
                    workers.append(begin(len(workers), "messages"))
        finally:
            for worker in workers:
                worker.join()
        with ParameterServerSession(addresses, worker_id="reader", shared_memory=False) as reader:
            center, step = reader.pull(catch_up=False)
    centers.add(f"{step} {hash_of(center)}")
    assert [worker.ends[-1] for worker in workers] == [0] * len(workers)
    assert step >= rounds
    assert {step: hashes for step, hashes in centers.hashes.items() if len(hashes) != 1} == {}
    assert sorted(centers.hashes)[-1] == step
    if policy is STRICT:
        assert sorted(centers.hashes) == list(range(rounds + 1))
