"""Outer optimizers through servers: any number of shards gives the same bits, and a state changes in steps only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import OuterAdam, OuterSGD, ParameterServerSession, PushResult
from modelaverage.outer import AVERAGE, OuterOptimizer, text_of
from modelaverage.outer.base import MASTER, summed_in
from modelaverage.placement import PLACEMENTS
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.center import Center
from ps_server.checkpoints.keeper import CheckpointPolicy
from tests.centers import random_arrays
from tests.checkpoints import small, write_fresh
from tests.conftest import StartServer
from tests.faults import RestartedServer, Training
from tests.jobs import CENTER, COUNT, STEP, Job, of
from tests.kept_jobs import newest
from tests.optimizer.workers import together
from tests.outer_oracles import formula
from tests.raw_client import RawClient, flat_bytes, fragments_of, until

OUTERS = (OuterSGD(0.7, 0.9, nesterov=True), OuterAdam(0.1))
Arrays = Mapping[str, NDArray[Any]]

# Several servers.

MODEL: Arrays = {
    "large": np.linspace(-1.0, 1.0, 300, dtype=np.float32).reshape(20, 15),
    "nothing": np.zeros((0, 3), np.float32),
    "double": np.linspace(0.0, 1.0, 60),
    "half": np.linspace(-2.0, 2.0, 50).astype(np.float16),
    "brain": np.linspace(-2.0, 2.0, 70).astype(ml_dtypes.bfloat16),
    "scale": np.array(0.5, np.float32),
}
ROUNDS = 6


def local(center: Arrays, worker: int, step: int) -> dict[str, NDArray[Any]]:
    """What a worker has made of the center; the same whatever the number of servers."""
    chance = np.random.default_rng((worker, step))
    return {
        name: (array.astype(np.float64) * 0.9 + chance.normal(size=array.shape)).astype(array.dtype)
        for name, array in center.items()
    }


def rounds(addresses: list[str], placement: str, outer: OuterOptimizer) -> list[dict[str, bytes]]:
    """The centers of a job of two workers. In some rounds variables are untouched, one abstains, or both do."""
    sessions = [
        ParameterServerSession(
            addresses, worker_id=name, is_chief=name == "a", placement=placement, fragment_size_bytes=128
        )
        for name in "ab"
    ]
    with sessions[0], sessions[1]:
        sessions[0].initialize(MODEL, outer_optimizer=outer)
        center, _ = (session.pull()[0] for session in sessions)
        centers = list[dict[str, bytes]]()
        for step in range(ROUNDS):
            untouched = ("double", "half") if step == 2 else ()
            weights = {3: (1.0, 0.0), 4: (0.0, 0.0)}.get(step, (1.0, 3.0))

            def push(worker: int, center: Arrays = center, step: int = step, weights: Any = weights) -> PushResult:
                mine = {**local(center, worker, step), **{name: center[name] for name in untouched}}  # noqa: B023
                return sessions[worker].push_and_average(mine, weights[worker], untouched=untouched)  # noqa: B023

            results = together(lambda: push(0), lambda: push(1))
            center = {name: array.copy() for name, array in results[0].center.items()}
            centers.append({name: array.tobytes() for name, array in center.items()})
            assert centers[-1] == {name: array.tobytes() for name, array in results[1].center.items()}
    return centers


@pytest.mark.in_memory
@pytest.mark.parametrize("outer", OUTERS)
def test_any_number_of_servers_and_both_placements_give_the_same_bits(
    outer: OuterOptimizer, start_server: StartServer
) -> None:
    expected = rounds([start_server(2).address], "balanced", outer)
    assert len({tuple(center.items()) for center in expected}) == ROUNDS - 1  # all abstain in one round
    assert expected != rounds([start_server(2).address], "balanced", AVERAGE)
    for count in (2, 3):
        for placement in PLACEMENTS:
            addresses = [start_server(2).address for _ in range(count)]
            assert rounds(addresses, placement, outer) == expected, f"{count} servers, {placement}"


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.long)])
def test_a_shard_that_comes_back_late_goes_on_with_its_state(kills: int, tmp_path: Path) -> None:
    start = {"w": np.zeros(600, np.float32), "v": np.ones(500, np.float32)}
    moment = "when a fragment is averaged"
    deaths = tuple((moment, 7 + 4 * (number % 3)) for number in range(kills))
    with (
        RestartedServer(tmp_path / "0", "--num-workers", "2") as steady,
        RestartedServer(tmp_path / "1", "--num-workers", "2", deaths=deaths) as dies,
    ):
        training = Training(
            steady.address,
            start,
            workers=2,
            rounds=4 * kills + 4,
            fragment_size_bytes=512,
            more_shards=[dies.address],
            outer=OUTERS[0],
        )
        training.check(training.run())
        assert len(dies.ends) == kills
        assert not steady.ends


# One server, and what its checkpoints say of its state.


@dataclasses.dataclass
class Oracle:
    """The center before rounding, and the state."""

    outer: OuterOptimizer
    exact: dict[str, NDArray[Any]]
    state: dict[str, dict[str, NDArray[Any]]]  # by variable

    def step(self, average: Arrays, but: frozenset[str] = frozenset()) -> None:
        for name, center in self.exact.items():
            if name not in but:
                mean = average[name].astype(center.dtype)
                self.exact[name], self.state[name] = formula(self.outer, center, mean, self.state[name])

    def become(self, average: Arrays) -> None:
        self.exact = {name: average[name].astype(center.dtype) for name, center in self.exact.items()}

    def check(self, directory: Path, global_step: int) -> None:
        """Raises AssertionError unless the newest checkpoint has this center and this state."""
        kept = newest(directory)
        assert (kept.global_step, kept.outer) == (global_step, self.outer)
        for name, exact in self.exact.items():
            assert kept.arrays[name].tobytes() == exact.astype(kept.arrays[name].dtype).tobytes(), name
            for slot, array in self.state[name].items():
                assert kept.state[slot][name].tobytes() == array.tobytes(), f"{slot} of {name}"
            if name in kept.state.get(MASTER, {}):
                assert kept.state[MASTER][name].tobytes() == exact.tobytes(), f"master of {name}"


def begun(directory: Path, outer: OuterOptimizer) -> Oracle:
    """Writes a checkpoint of a job with any state."""
    chance = np.random.default_rng(0)
    state = Center(small().manifest, outer=outer).current.state
    exact = {name: array.astype(summed_in(array.dtype)) for name, array in CENTER.items()}
    for slot, arrays in state.arrays.items():
        for name, array in arrays.items():
            array[...] = exact[name] if slot == MASTER else np.abs(chance.normal(size=array.shape))
    write_fresh(directory, dataclasses.replace(small(), arrays=CENTER, counted={}, outer=outer, state=state.arrays))
    return Oracle(
        outer, exact, {name: {slot: state.arrays[slot][name].copy() for slot in outer.slots} for name in CENTER}
    )


def values(step: int) -> Arrays:
    return random_arrays(small().manifest, np.random.default_rng(step), 3.0)


def break_off(job: Job, client: RawClient, fields: Mapping[str, Any]) -> None:
    """A push of which all fragments but the last come, and are averaged; then its process is gone."""
    with RawClient(job.address) as broken:
        stream, first = job.admitted("a", broken, **fields)
        stream.give(fragments_of(of(50)), first, COUNT - 1)
        until(lambda: client.worker("a").fragments_given == COUNT - 1, "the fragments came")
    until(lambda: client.status().connected_workers == 0, "the server has noticed")


EVENTS = ("step", "abstains", "restores", "is ahead", "untouched", "starts over")


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("outer", OUTERS)
def test_the_state_advances_in_steps_only_and_another_server_goes_on_with_it(
    outer: OuterOptimizer, event: str, start_server: StartServer, tmp_path: Path
) -> None:
    oracle, step = begun(tmp_path, outer), STEP
    for what in ("step", event, "step"):  # each on another server
        server = start_server(1, checkpoints=CheckpointPolicy(tmp_path))
        with RawClient(server.address) as client:
            assert client.status().outer_optimizer == text_of(outer)
            job, given = Job(client, server.address), values(step)
            fields = dict[str, Any](base_step=step, push_id=step)
            untouched = frozenset[str]()
            if what == "starts over":
                break_off(job, client, fields)
                fields["incarnation"] = b"another process!"
            if what == "untouched":
                untouched = frozenset(("w", "brain"))
                fields["untouched_variables"] = [n for n, name in enumerate(CENTER) if name in untouched]
                given = {**given, **{name: CENTER[name] for name in untouched}}
            if what == "is ahead":
                fields["base_step"] = step = step + 5
            if what == "abstains":
                stream = client.open_push()
                stream.send(job.header("a", purpose=pb.PURPOSE_ABSTAIN, **fields))
                stream.half_close()
            else:
                purpose = {"restores": pb.PURPOSE_RESTORE}.get(what, pb.PURPOSE_CONTRIBUTE)
                stream = job.push("a", given, purpose=purpose, **fields)
            outcome, came = stream.answer()
            assert (outcome.outcome, outcome.global_step) == (pb.OUTCOME_COMMITTED, step + 1)
        server.stop()
        if what in ("restores", "is ahead"):
            oracle.become(given)
        elif what != "abstains":
            oracle.step(given, untouched)
        step += 1
        oracle.check(tmp_path, step)
        assert came == flat_bytes({name: oracle.exact[name].astype(CENTER[name].dtype) for name in CENTER})


def test_a_checkpoint_of_before_there_were_outer_optimizers_goes_on_as_the_average(
    start_server: StartServer, tmp_path: Path
) -> None:
    path = write_fresh(tmp_path, dataclasses.replace(small(), arrays=CENTER, counted={}))
    assert b'"outer' not in path.read_bytes()
    server = start_server(1, checkpoints=CheckpointPolicy(tmp_path))
    with RawClient(server.address) as client:
        job = Job(client, server.address)
        assert client.status().outer_optimizer == ""
        assert client.pull()[0].outer_optimizer == ""
        _, came = job.push("a", of(5), base_step=STEP, push_id=1).answer()
    assert came == flat_bytes(of(5))
