"""Nothing is lost when one of several servers, or a worker, dies in the middle of a round. Processes, SIGKILL."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ma_client import Outcome, ParameterServerSession
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.faults import HANG_S, Model, RestartedServer, Training, trained, undisturbed
from tests.killed_server import BETWEEN_TWO_ANSWERS, MOMENTS
from tests.long_plays import long_except
from tests.raw_client import RawClient
from tests.shard_faults import soon
from tests.shard_worker import START, ShardWorker

WORKERS, ROUNDS, MIDDLE = 2, 20, 10
# 3 fragments of 256 bytes for each of two servers.
SMALL: Model = {"w": np.zeros(380, np.float32), "b": np.ones((), np.float32), "c": np.ones(3, np.float32)}
# How often a moment comes in a round, at least.
TIMES_A_ROUND = {"in the middle of the fragments": 6, BETWEEN_TWO_ANSWERS: 2}
# Moments at which a shard knows something about a round that the others do not, or the reverse.
TELLING = [
    "in the middle of the fragments",
    "before the checkpoint",
    BETWEEN_TWO_ANSWERS,
]
BEFORE_THE_CHECKPOINT = ("before the checkpoint", MIDDLE + 1)  # the first is that of the initial center

StartServers = Callable[..., list[RestartedServer]]
StartWorker = Callable[..., ShardWorker]


@pytest.fixture
def start_servers(tmp_path: Path) -> Iterator[StartServers]:
    """start_servers([option], ..., [option]) -> a server for each list of `RestartedServer` options."""
    with contextlib.ExitStack() as running:

        def start(*options: Mapping[str, object], flags: tuple[str, ...] = ()) -> list[RestartedServer]:
            def one(index: int) -> RestartedServer:
                extra = dict(options[index])
                own_flags = extra.pop("flags", ())
                assert isinstance(own_flags, tuple)
                arguments = ("--num-workers", str(WORKERS), *flags, *own_flags)
                return RestartedServer(tmp_path / str(index), *arguments, **extra)  # type: ignore[arg-type]

            with ThreadPoolExecutor(len(options)) as threads:
                servers = list(threads.map(one, range(len(options))))
            for server in servers:
                running.enter_context(server)
            return servers

        yield start


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    started = list[ShardWorker]()

    def start(*arguments: object, **options: object) -> ShardWorker:
        started.append(ShardWorker(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def training_on(servers: list[RestartedServer], rounds: int = ROUNDS) -> Training:
    first, *others = [server.address for server in servers]
    return Training(first, SMALL, WORKERS, rounds, fragment_size_bytes=256, more_shards=others)


def addresses_of(servers: list[RestartedServer]) -> list[str]:
    return [server.address for server in servers]


def status_of(server: RestartedServer) -> pb.GetStatusResponse:
    with RawClient(server.address) as client:
        return client.status()


def steps(servers: list[RestartedServer]) -> list[int]:
    return [status_of(server).global_step for server in servers]


def has_whole(server: RestartedServer, worker_id: str) -> bool:
    """Whether a worker's push is whole in its round in progress."""
    return any(worker.waiting and worker.worker_id == worker_id for worker in status_of(server).workers)


def center_of(servers: list[RestartedServer]) -> Model:
    with ParameterServerSession(addresses_of(servers), worker_id="reader") as session:
        center, _ = session.pull(catch_up=False, timeout_s=HANG_S)
        return center


# A shard dies; the workers live.


def check_that_a_killed_shard_costs_nothing(
    start_servers: StartServers, moment: str, victim: int, num_shards: int
) -> None:
    death = {"deaths": ((moment, TIMES_A_ROUND.get(moment, 1) * (MIDDLE - 1) + 1),)}
    servers = start_servers(*[death if index == victim else {} for index in range(num_shards)])
    training = training_on(servers)
    training.check(training.run())
    assert servers[victim].ends == [-signal.SIGKILL], f"the server never came to {moment!r}"
    assert steps(servers) == [ROUNDS] * num_shards


@pytest.mark.parametrize(
    ("moment", "victim"),
    long_except([(BETWEEN_TWO_ANSWERS, 0)], [(moment, number % 2) for number, moment in enumerate(TELLING)]),
)
def test_a_shard_killed_in_the_middle_of_twenty_rounds_costs_none_of_them(
    start_servers: StartServers, moment: str, victim: int
) -> None:
    check_that_a_killed_shard_costs_nothing(start_servers, moment, victim, num_shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("moment", [*MOMENTS, BETWEEN_TWO_ANSWERS])
def test_any_of_three_shards_killed_at_any_moment_costs_no_round(
    start_servers: StartServers, moment: str, victim: int
) -> None:
    check_that_a_killed_shard_costs_nothing(start_servers, moment, victim, num_shards=3)


@pytest.mark.parametrize("late", long_except([1], [0, 1]))
def test_a_shard_killed_between_the_others_commits_and_its_own_commits_the_same_round(
    start_servers: StartServers, late: int
) -> None:
    servers = start_servers(*[{"stop": BEFORE_THE_CHECKPOINT} if index == late else {} for index in range(2)])
    training = training_on(servers)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(training.run)
        assert soon(lambda: steps([servers[1 - late]]) == [MIDDLE]), "the other shard did not commit"
        servers[late].kill()
        training.check(done.result(HANG_S))
    assert steps(servers) == [ROUNDS, ROUNDS]


def test_a_shard_killed_after_its_answers_while_another_has_not_committed_loses_nothing(
    start_servers: StartServers,
) -> None:
    first, second = start_servers({"deaths": (("after the answer", MIDDLE),)}, {"stop": BEFORE_THE_CHECKPOINT})
    training = training_on([first, second])
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(training.run)
        assert soon(lambda: bool(first.ends)), "the first shard did not die"
        assert soon(lambda: second.stands_still), "the second shard did not stop"
        second.go_on()
        training.check(done.result(HANG_S))
    assert steps([first, second]) == [ROUNDS, ROUNDS]


def test_a_worker_that_waits_at_the_barrier_waits_on_when_a_shard_comes_back(start_servers: StartServers) -> None:
    servers = start_servers({}, {})
    with contextlib.ExitStack() as sessions, ThreadPoolExecutor(1) as thread:
        workers = [
            sessions.enter_context(
                ParameterServerSession(addresses_of(servers), worker_id=f"worker-{number}", is_chief=number == 0)
            )
            for number in range(WORKERS)
        ]
        workers[0].initialize(SMALL)
        centers = [worker.pull(timeout_s=HANG_S)[0] for worker in workers]
        waiting = thread.submit(workers[0].push_and_average, trained(centers[0], 0, 0), timeout_s=HANG_S)
        assert soon(lambda: all(has_whole(server, "worker-0") for server in servers))
        servers[0].kill()
        last = workers[1].push_and_average(trained(centers[1], 1, 0), timeout_s=HANG_S)
        results = [last, waiting.result(HANG_S)]
    expected = undisturbed(SMALL, WORKERS, 1)
    for result in results:
        assert (result.outcome, result.global_step) == (Outcome.COMMITTED, 1)
        assert all(np.array_equal(result.center[name], expected[name]) for name in SMALL)


# Everything dies.


def kill_all(workers: list[ShardWorker], servers: list[RestartedServer]) -> None:
    """Kills the workers first, so that they do not react to what the servers have forgotten; restarts the servers."""
    for worker in workers:
        worker.kill()
    for server in servers:
        server.kill()
    for server in servers:
        server.listens()


def test_shards_whose_checkpoints_differ_by_a_step_go_on_from_the_later_one(
    start_servers: StartServers, start_worker: StartWorker
) -> None:
    servers = start_servers({}, {"stop": BEFORE_THE_CHECKPOINT})
    workers = [start_worker(number, addresses_of(servers), ROUNDS) for number in range(WORKERS)]
    assert soon(lambda: steps(servers[:1]) == [MIDDLE], 2 * HANG_S), "the first shard did not commit"
    kill_all(workers, servers)
    assert steps(servers) == [MIDDLE, MIDDLE - 1]
    workers = [start_worker(number, addresses_of(servers), ROUNDS) for number in range(WORKERS)]
    for worker in workers:
        worker.comes_to(ROUNDS)
    assert steps(servers) == [ROUNDS, ROUNDS]
    # What the second shard had not committed is gone with the workers; its center passes for that of the same step.
    kept = {"a": undisturbed(START, WORKERS, MIDDLE)["a"], "b": undisturbed(START, WORKERS, MIDDLE - 1)["b"]}
    expected, center = undisturbed(kept, WORKERS, ROUNDS, since=MIDDLE), center_of(servers)
    assert all(np.array_equal(center[name], expected[name]) for name in START)


@pytest.mark.long
def test_shards_whose_checkpoints_differ_by_many_steps_go_on_from_the_latest(
    start_servers: StartServers, start_worker: StartWorker
) -> None:
    servers = start_servers({"flags": ("--checkpoint-every-rounds", "1000")}, {})
    workers = [start_worker(number, addresses_of(servers), 10**9) for number in range(WORKERS)]
    for worker in workers:
        worker.comes_to(10)
    kill_all(workers, servers)
    first, latest = steps(servers)
    assert first == 0
    assert latest >= 10
    workers = [start_worker(number, addresses_of(servers), latest + 5) for number in range(WORKERS)]
    for worker in workers:
        worker.comes_to(latest + 5)
    assert steps(servers) == [latest + 5, latest + 5]
    kept = {"a": START["a"], "b": undisturbed(START, WORKERS, latest)["b"]}
    expected, center = undisturbed(kept, WORKERS, latest + 5, since=latest), center_of(servers)
    assert all(np.allclose(center[name], expected[name], rtol=1e-5, atol=1e-6) for name in START)


# A worker dies.


@pytest.mark.parametrize("given", long_except([1], [0, 1]))
def test_a_worker_killed_when_one_shard_has_its_push_and_the_other_has_not_comes_back_to_even_shards(
    start_servers: StartServers, start_worker: StartWorker, given: int
) -> None:
    servers = start_servers({}, {})
    victim = start_worker(0, addresses_of(servers), 10, hold=(1, given, 5))
    other = start_worker(1, addresses_of(servers), 10)
    assert soon(lambda: steps(servers) == [6, 5] and has_whole(servers[1], "worker-1"), 2 * HANG_S)
    victim.kill()
    assert soon(lambda: steps(servers) == [6, 5] and status_of(servers[1]).waiting_for == ["worker-0"])
    start_worker(0, addresses_of(servers), 10).comes_to(10)
    other.comes_to(10)
    assert steps(servers) == [10, 10]
    # On the second shard, round 5 has only the other worker's push.
    fifth = undisturbed(START, WORKERS, 5)
    sixth = {"a": undisturbed(fifth, WORKERS, 6, since=5)["a"], "b": trained(fifth, 1, 5)["b"]}
    expected, center = undisturbed(sixth, WORKERS, 10, since=6), center_of(servers)
    assert np.array_equal(center["a"], expected["a"])
    assert np.allclose(center["b"], expected["b"], rtol=1e-5)


def test_with_a_quorum_rounds_go_on_without_a_worker_that_was_killed_between_two_shards(
    start_servers: StartServers, start_worker: StartWorker
) -> None:
    servers = start_servers({}, {}, flags=("--min-workers", "1", "--grace-s", "0.5"))
    victim = start_worker(0, addresses_of(servers), 10, hold=(1, 1, 5))
    other = start_worker(1, addresses_of(servers), 10)
    victim.comes_to(5)
    assert soon(lambda: steps(servers[:1]) == [6])
    victim.kill()
    other.comes_to(10)
    assert steps(servers) == [10, 10]


# Ctrl-C.


def check_that_ctrl_c_ends(worker: ShardWorker) -> None:
    began_at_s = time.monotonic()
    worker.interrupt()
    assert worker.end() == -signal.SIGINT
    assert time.monotonic() - began_at_s < 3
    assert worker.errors.count("Traceback") == 1, worker.errors
    assert worker.errors.endswith("KeyboardInterrupt\n"), worker.errors


def test_ctrl_c_ends_a_worker_that_waits_at_the_barrier(start_servers: StartServers, start_worker: StartWorker) -> None:
    servers = start_servers({}, {})
    worker = start_worker(0, addresses_of(servers), 10)
    assert soon(lambda: all(has_whole(server, "worker-0") for server in servers), 2 * HANG_S)
    check_that_ctrl_c_ends(worker)


@pytest.mark.long
def test_ctrl_c_ends_a_worker_while_a_server_is_away(start_servers: StartServers, start_worker: StartWorker) -> None:
    servers = start_servers({}, {})
    worker = start_worker(0, addresses_of(servers), 10)
    assert soon(lambda: all(has_whole(server, "worker-0") for server in servers), 2 * HANG_S)
    servers[1].end()
    worker.logged("trying again")
    check_that_ctrl_c_ends(worker)


@pytest.mark.long
def test_ctrl_c_ends_a_worker_that_waits_for_a_late_shard(
    start_servers: StartServers, start_worker: StartWorker
) -> None:
    servers = start_servers({}, {"flags": ("--checkpoint-every-rounds", "1000")})
    workers = [start_worker(number, addresses_of(servers), 3) for number in range(WORKERS)]
    for worker in workers:
        worker.comes_to(3)
    kill_all(workers, servers)
    assert steps(servers) == [3, 0]
    worker = start_worker(0, addresses_of(servers), 10)
    assert soon(lambda: has_whole(servers[1], "worker-0"), 2 * HANG_S)
    check_that_ctrl_c_ends(worker)
