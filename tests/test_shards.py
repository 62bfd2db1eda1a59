"""One job on several parameter servers, from outside: real servers, real sessions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession
from ma_client.job.assembly import Assembly
from ma_client.job.results import PushResult
from ma_client.values.raw import bytes_of
from modelaverage import wire
from modelaverage.errors import ConflictError, DeadlineExceededError, InvalidRequestError, NotInitializedError, Reason
from modelaverage.manifest import Manifest, Variable, dtype_name
from modelaverage.outcome import Outcome
from modelaverage.placement import PLACEMENTS, place
from ps_server.__main__ import main
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP, of
from tests.raw_client import Arrays, RawClient, initialize_header, push_header

TIMEOUT_S = 30.0


def session(addresses: list[str], worker_id: str, **options: Any) -> ParameterServerSession:
    return ParameterServerSession(addresses, worker_id=worker_id, is_chief=worker_id == "worker-0", **options)


def start(start_server: StartServer, count: int, num_workers: int = 2, **options: Any) -> list[str]:
    return [start_server(num_workers, **options).address for _ in range(count)]


def random_model(seed: int, sizes: tuple[int, ...] = (1, 0, 1000, 37, 4099)) -> Arrays:
    rng = np.random.default_rng(seed)
    return {f"v{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}


def all_at_once(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(TIMEOUT_S) for future in [threads.submit(call) for call in calls]]


class Workers:
    """Sessions of one job; closed at the end."""

    def __init__(self) -> None:
        self.sessions: list[ParameterServerSession] = []

    def join(self, addresses: list[str], count: int, center: Arrays, **options: Any) -> list[ParameterServerSession]:
        """This many workers with the center; the first has initialized it."""
        joined = [session(addresses, f"worker-{index}", **options) for index in range(count)]
        self.sessions += joined
        joined[0].initialize(center, global_step=STEP)
        for one in joined:
            one.pull(timeout_s=TIMEOUT_S)
        return joined

    def add(self, one: ParameterServerSession) -> ParameterServerSession:
        self.sessions.append(one)
        return one


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    for one in workers.sessions:
        one.close()


def push(workers: list[ParameterServerSession], models: list[Arrays], **options: Any) -> list[PushResult]:
    calls = [
        lambda one=one, model=model: one.push_and_average(model, timeout_s=TIMEOUT_S, **options)
        for one, model in zip(workers, models, strict=True)
    ]
    return all_at_once(*calls)


def steps(addresses: list[str]) -> list[int]:
    found = []
    for address in addresses:
        with RawClient(address) as client:
            found.append(client.status().global_step)
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_the_center_is_the_same_bit_for_bit_on_any_number_of_servers(
    start_server: StartServer, workers: Workers, count: int, placement: str, shared: bool
) -> None:
    addresses = start(start_server, count, shared=shared)
    joined = workers.join(addresses, 2, random_model(0), placement=placement, fragment_size_bytes=256)
    for turn in range(3):
        models = [random_model(10 * turn + index) for index in range(2)]
        for result in push(joined, models):
            assert (result.outcome, result.global_step) == (Outcome.COMMITTED, STEP + turn + 1)
            assert result.contributors == ("worker-0", "worker-1")
            assert list(result.center) == list(models[0])
            for name in models[0]:
                expected = (models[0][name] + models[1][name]) / np.float32(2)
                assert result.center[name].tobytes() == expected.tobytes()
    center, step = joined[1].pull()
    assert step == STEP + 3
    assert all(center[name].tobytes() == result.center[name].tobytes() for name in center)
    assert steps(addresses) == [STEP + 3] * count


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_dtypes_and_shapes_come_back_from_several_servers(
    start_server: StartServer, workers: Workers, placement: str
) -> None:
    joined = workers.join(start(start_server, 3), 2, CENTER, placement=placement, fragment_size_bytes=64)
    center, _ = joined[0].pull()
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in center.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in CENTER.items()
    }
    first, _ = push(joined, [of(1), of(3)])
    assert all((array == 2).all() for array in first.center.values())


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_result_is_a_copy_or_cannot_be_written_to(
    start_server: StartServer, workers: Workers, copy: bool, shared: bool
) -> None:
    addresses = start(start_server, 2, num_workers=1, shared=shared)
    (one,) = workers.join(addresses, 1, random_model(0), fragment_size_bytes=512)
    result = one.push_and_average(random_model(1), copy=copy)
    for name, array in result.center.items():
        assert array.tobytes() == random_model(1)[name].tobytes()
    kept = {name: array.copy() for name, array in result.center.items()}
    if copy:
        one.push_and_average(random_model(2))
        assert all(result.center[name].tobytes() == kept[name].tobytes() for name in kept)
    else:
        # A result may be pushed again, although its memory is where the next center arrives.
        again = one.push_and_average(result.center, copy=False)
        assert all(again.center[name].tobytes() == kept[name].tobytes() for name in kept)


def test_a_variable_is_untouched_only_if_nobody_touched_any_of_its_parts(
    start_server: StartServer, workers: Workers
) -> None:
    center = random_model(0)
    joined = workers.join(start(start_server, 3), 2, center, fragment_size_bytes=256)
    models = [random_model(1), random_model(2)]
    one, other = all_at_once(
        lambda: joined[0].push_and_average(models[0], untouched={"v2", "v4"}),
        lambda: joined[1].push_and_average(models[1], untouched={"v4", "v3"}),
    )
    assert one.untouched == other.untouched == {"v4"}
    assert one.center["v4"].tobytes() == center["v4"].tobytes()
    assert one.center["v2"].tobytes() != center["v2"].tobytes()


def test_weights_count_on_every_server(start_server: StartServer, workers: Workers) -> None:
    joined = workers.join(start(start_server, 2), 2, CENTER, fragment_size_bytes=64)
    one, _ = all_at_once(
        lambda: joined[0].push_and_average(of(1), weight=3.0), lambda: joined[1].push_and_average(of(5), weight=1.0)
    )
    assert all((array == 2).all() for array in one.center.values())


def test_a_model_smaller_than_the_number_of_servers_works(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 5)
    joined = workers.join(addresses, 2, {"w": np.float32(1)})
    first, _ = push(joined, [{"w": np.float32(2)}, {"w": np.float32(4)}])
    assert first.center["w"] == 3
    assert steps(addresses) == [STEP + 1] * 5


def test_a_late_worker_learns_from_the_servers_what_lies_where(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 3)
    workers.join(addresses, 1, CENTER, placement="round_robin", fragment_size_bytes=64)
    late = workers.add(session(addresses, "worker-1"))  # has no placement and no fragment size of its own
    center, step = late.pull()
    assert step == STEP
    assert all(center[name].tobytes() == CENTER[name].tobytes() for name in CENTER)


def test_a_push_that_is_not_whole_on_all_servers_within_its_time_can_be_made_again(
    start_server: StartServer, workers: Workers
) -> None:
    addresses = start(start_server, 2)
    joined = workers.join(addresses, 2, CENTER, fragment_size_bytes=64)
    with pytest.raises(DeadlineExceededError):
        joined[0].push_and_average(of(1), timeout_s=0.3)
    first, second = push(joined, [of(1), of(3)])
    assert first.global_step == second.global_step == STEP + 1
    assert all((array == 2).all() for array in second.center.values())


def test_a_failure_at_one_server_ends_the_push_at_all(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 2)
    one, _ = workers.join(addresses, 2, CENTER, fragment_size_bytes=64)
    with RawClient(addresses[1]) as client:  # another process has this worker's id there
        manifest_id = client.status().manifest_id
        stream = client.open_push()
        stream.send(push_header(manifest_id, "worker-0", base_step=STEP))
        stream.admission()
        impatient = workers.add(session(addresses, "worker-0", reconnect_timeout_s=0))
        impatient.pull()
        with pytest.raises(ConflictError) as refused:
            impatient.push_and_average(of(1))  # without a timeout: the other server would wait for ever
    assert refused.value.reason is Reason.WORKER_ID_IN_USE
    assert one.worker_id in str(refused.value)


# Servers and workers that belong together.


def test_servers_in_the_wrong_order_are_refused(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 2)
    workers.join(addresses, 1, CENTER)
    swapped = addresses[::-1]
    with pytest.raises(ConflictError, match="shard 1 of 2") as refused:
        workers.add(session(swapped, "worker-1")).pull()
    assert swapped[0] in str(refused.value)


def test_a_missing_server_is_noticed(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 3)
    workers.join(addresses, 1, CENTER)
    with pytest.raises(ConflictError, match="2 addresses were given"):
        workers.add(session(addresses[:2], "worker-1")).pull()
    with pytest.raises(ConflictError, match="1 address was given"):
        workers.add(session(addresses[:1], "worker-1")).pull()


def test_another_jobs_server_is_refused(start_server: StartServer, workers: Workers) -> None:
    ours, theirs = start(start_server, 2), start(start_server, 2)
    workers.join(ours, 1, CENTER)
    workers.join(theirs, 1, CENTER)
    with pytest.raises(ConflictError, match="of job") as refused:
        workers.add(session([ours[0], theirs[1]], "worker-1")).pull()
    assert theirs[1] in str(refused.value)


def test_a_whole_model_and_a_shard_are_refused(start_server: StartServer, workers: Workers) -> None:
    shards, alone = start(start_server, 2), start(start_server, 1)
    workers.join(shards, 1, CENTER)
    workers.join(alone, 1, CENTER)
    with pytest.raises(ConflictError, match="whole model"):
        workers.add(session([shards[0], alone[0]], "worker-1")).pull()


def test_a_chief_with_too_few_servers_changes_nothing(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 2)
    workers.join(addresses, 1, CENTER)
    with pytest.raises(ConflictError):
        workers.add(session(addresses[:1], "worker-0")).initialize(CENTER)
    assert steps(addresses) == [STEP, STEP]


def test_servers_for_different_numbers_of_workers_are_refused(start_server: StartServer, workers: Workers) -> None:
    addresses = [start_server(2).address, start_server(3).address]
    with pytest.raises(ConflictError, match="--num-workers 3") as refused:
        workers.join(addresses, 1, CENTER)
    assert addresses[1] in str(refused.value)


def test_another_model_is_refused_by_the_name_of_its_variable(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 2)
    workers.join(addresses, 1, CENTER)
    with pytest.raises(ConflictError, match="'last'") as refused:
        workers.add(session(addresses, "worker-0")).initialize({**CENTER, "last": np.zeros(1)})
    assert refused.value.reason is Reason.MANIFEST_MISMATCH


# Output.


def test_the_status_command_shows_every_server(
    start_server: StartServer, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = start(start_server, 2)
    workers.join(addresses, 1, CENTER)
    assert main(["status", *addresses]) == 0
    text = capsys.readouterr().out
    assert "shard 0 of 2" in text
    assert "shard 1 of 2" in text
    assert main(["status", *addresses, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [status["shard"]["index"] for status in shown] == [0, 1]
    assert len({status["shard"]["job_id"] for status in shown}) == 1


# Interrupted initialization.


def raw_initialize(
    address: str,
    model: Arrays,
    index: int,
    count: int,
    job: bytes,
    global_step: int = STEP,
    frozen_digests: bytes = b"",
) -> None:
    """Does what a chief does that dies between two servers."""
    variables = tuple(Variable(n, dtype_name(a.dtype), a.shape) for n, a in model.items())
    shards = place(Manifest(variables, 64, frozen_digests=frozen_digests), count, "balanced", job)
    values = Assembly(shards, ["?"] * count).cut([bytes_of(array) for array in model.values()])[index]
    with RawClient(address) as client:
        stream = client.open_initialize()
        stream.send(initialize_header(wire.manifest_to_message(shards[index]), global_step=global_step))
        stream.give([b"".join(shards[index].fragment_parts(n, values)) for n in range(shards[index].fragment_count)])
        stream.half_close()
        assert stream.receive().initialized


def test_a_chief_completes_what_its_predecessor_could_not(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 3)
    job = b"sixteen bytes..."
    raw_initialize(addresses[0], CENTER, 0, 3, job)
    chief = workers.add(session(addresses, "worker-0", fragment_size_bytes=64))
    assert chief.initialize(CENTER, global_step=STEP).initialized
    assert chief.pull()[1] == STEP
    for status in chief.statuses():
        assert status.shard.job_id == job
    assert not chief.initialize(CENTER, global_step=STEP).initialized


@pytest.mark.parametrize("index", [0, 1])
def test_a_chief_completes_a_center_beside_other_frozen_parameters(
    index: int, start_server: StartServer, workers: Workers
) -> None:
    addresses = start(start_server, 2)
    raw_initialize(addresses[index], CENTER, index, 2, b"sixteen bytes...", frozen_digests=b"earlier!")
    chief = workers.add(session(addresses, "worker-0", fragment_size_bytes=64))
    assert chief.initialize(CENTER, global_step=STEP, frozen_digests=b"present!").initialized
    assert chief.pull()[1] == STEP
    assert chief.frozen_digests == (b"earlier!", b"present!")[index]  # those of the first server


def test_a_server_that_lost_its_part_of_a_job_is_not_initialized_again(
    start_server: StartServer, workers: Workers
) -> None:
    addresses = start(start_server, 2)
    raw_initialize(addresses[0], CENTER, 0, 2, b"sixteen bytes...", global_step=STEP + 5)
    chief = workers.add(session(addresses, "worker-0", fragment_size_bytes=64))
    with pytest.raises(NotInitializedError, match="--checkpoint-dir") as refused:
        chief.initialize(CENTER)
    assert addresses[1] in str(refused.value)
    with RawClient(addresses[1]) as client:
        assert client.status().manifest_id == ""


def test_a_chief_that_would_place_a_half_made_center_otherwise_is_refused(
    start_server: StartServer, workers: Workers
) -> None:
    addresses = start(start_server, 2)
    raw_initialize(addresses[0], CENTER, 0, 2, b"sixteen bytes...")
    chief = workers.add(session(addresses, "worker-0", fragment_size_bytes=64, placement="round_robin"))
    with pytest.raises(ConflictError, match="again") as refused:
        chief.initialize(CENTER, global_step=STEP)
    assert addresses[0] in str(refused.value)


def test_a_session_refuses_an_unknown_placement() -> None:
    with pytest.raises(InvalidRequestError, match="'best'"):
        session(["127.0.0.1:1"], "worker-0", placement="best")


def test_workers_wait_for_the_chief_on_all_servers(start_server: StartServer, workers: Workers) -> None:
    addresses = start(start_server, 2)
    late = workers.add(session(addresses, "worker-1"))
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(late.pull(timeout_s=TIMEOUT_S)[1]))
    waiting.start()
    workers.join(addresses, 1, CENTER)
    waiting.join(TIMEOUT_S)
    assert got == [STEP]
