"""Nothing is lost when a server dies under its workers. Real processes, SIGKILL."""

from __future__ import annotations

import itertools
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ma_client import DataSettings, ParameterServerSession
from ma_client.transports.timing import Timing
from modelaverage.outer import AVERAGE, OuterAdam, OuterOptimizer, OuterSGD
from tests.faults import HANG_S, Model, RestartedServer, Training
from tests.killed_server import BETWEEN_TWO_ANSWERS, MOMENTS
from tests.long_plays import long_except
from tests.pairs import FRAGMENT_SIZE_BYTES, MODEL, Pair
from tests.raw_client import fragments_of

WORKERS, ROUNDS = 2, 6
SMALL: Model = {"w": np.zeros(300, np.float32), "b": np.ones((), np.float32)}  # 5 fragments of 256 bytes
LARGE: Model = {"w": np.zeros(1 << 18, np.float32), "b": np.ones((7, 3), np.float32)}  # large enough for shared memory
OUTERS = (OuterSGD(0.7, 0.9, nesterov=True), OuterAdam(0.1))
# How often a moment is reached in one round of two workers, for a model of 5 fragments.
TIMES_A_ROUND = {"in the middle of the fragments": 10, "when a fragment is averaged": 5, BETWEEN_TWO_ANSWERS: 2}


@pytest.mark.parametrize(
    ("moment", "on_data_connections"),
    long_except(
        [("before the checkpoint", False), ("in the middle of the fragments", True), (BETWEEN_TWO_ANSWERS, False)],
        itertools.product([*MOMENTS, BETWEEN_TWO_ANSWERS], [False, True]),
    ),
)
def test_a_server_killed_at_any_moment_of_a_round_costs_a_retry_and_not_a_round(
    moment: str, on_data_connections: bool, tmp_path: Path
) -> None:
    data = DataSettings(least_bytes=0 if on_data_connections else 1 << 20)
    times = TIMES_A_ROUND.get(moment, 2 if "header" in moment else 1)
    in_the_third_round = 2 * times + 1
    deaths = ((moment, in_the_third_round),)
    with RestartedServer(tmp_path, "--num-workers", str(WORKERS), deaths=deaths) as server:
        training = Training(server.address, SMALL, WORKERS, ROUNDS, fragment_size_bytes=256, data_connections=data)
        training.check(training.run())
        assert server.ends == [-signal.SIGKILL], f"the server never came to {moment!r}"


class Impatient(ParameterServerSession):
    """A session that hears of the end of a call after that of the data connection, as on a very busy machine."""

    _timing = Timing(last_word_s=0.0)


@pytest.mark.parametrize("session_class", [ParameterServerSession, Impatient])
def test_after_a_server_was_killed_and_started_again_data_connections_come_back_without_a_pause(
    tmp_path: Path, session_class: type[ParameterServerSession]
) -> None:
    settings = DataSettings(least_bytes=0, pause_s=600.0)
    in_the_tenth_round = 10 * 2 * len(fragments_of(MODEL, FRAGMENT_SIZE_BYTES)) - 5
    deaths = (("in the middle of the fragments", in_the_tenth_round),)
    with (
        RestartedServer(tmp_path, "--num-workers", "2", deaths=deaths) as server,
        Pair(server.address, settings, reconnect_timeout_s=HANG_S, session_class=session_class) as pair,
    ):
        pair.until_connected()
        while not server.ends:
            pair.round()
        pair.until_connected()
        server.kill()
        pair.until_connected()


@pytest.mark.parametrize("shared_memory", long_except([True], [True, False]))
def test_a_server_killed_again_and_again_loses_no_round(shared_memory: bool, tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, kills=4, seed=shared_memory, shared_memory=shared_memory)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_kills_of_the_server_lose_no_round(seed: int, tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, kills=25, seed=seed, shared_memory=seed % 2 == 0)


@pytest.mark.long
@pytest.mark.parametrize("outer", OUTERS)
def test_a_server_killed_again_and_again_loses_no_state_of_its_outer_optimizer(
    outer: OuterOptimizer, tmp_path: Path
) -> None:
    kill_at_random_moments(tmp_path, kills=30, seed=7, shared_memory=True, outer=outer)


def kill_at_random_moments(
    directory: Path, kills: int, seed: int, shared_memory: bool, outer: OuterOptimizer = AVERAGE
) -> None:
    """Runs a job that makes rounds until the last kill, and then a few more."""
    chance = random.Random(seed)
    with RestartedServer(directory, "--num-workers", str(WORKERS)) as server:
        training = Training(server.address, LARGE, WORKERS, rounds=10**9, shared_memory=shared_memory, outer=outer)
        done, survived = threading.Event(), list[bool]()

        def kill() -> None:
            for _ in range(kills):
                # After at least one round with every server, kills it at a random moment of the next few.
                survived.append(training.goes_on(done))
                done.wait(chance.uniform(0.0, 0.05))
                server.kill()
            training.rounds = training.rounds_made + 5

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            centers = training.run()
        finally:
            done.set()
            killer.join()
        assert server.ends == [-signal.SIGKILL] * kills
        assert all(survived)
        training.check(centers)
