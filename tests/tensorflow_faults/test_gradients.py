"""Gradients of None, and the slots of torch's optimizers: where the original fails, and what this project does
instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.tensorflow_faults.cluster import Cluster, mismatch, name_of, start_all
from tests.worker_process import TorchWorkerProcess, WorkerProcess

Values = Mapping[str, list[float]]
START: Values = {"w": [1.0, 2.0, 3.0], "b": [4.0, 5.0]}


def optimizing(cluster: Cluster, *options: Mapping[str, Any]) -> list[TorchWorkerProcess]:
    """Workers with a model and an optimizer. Worker 0 is the chief."""
    common = {"initial": START, "num_worker": 2}
    return cluster.workers(
        TorchWorkerProcess,
        [{**common, "worker_id": name_of(i), "is_chief": i == 0, **own} for i, own in enumerate(options)],
    )


def step_all(workers: Sequence[WorkerProcess], *gradients: Values) -> None:
    for worker, own in zip(workers, gradients, strict=True):
        worker.send("step", **own)
    for worker in workers:
        worker.answer()


def test_a_gradient_of_none_on_one_worker_only_is_pushed_like_the_others(cluster: Cluster) -> None:
    cluster.serve(2)
    workers = optimizing(cluster, {}, {"initial": {"w": [9.0] * 3, "b": [9.0] * 2}})
    start_all(workers)
    assert [worker.ask("state")["values"] for worker in workers] == [START, START]
    step_all(workers, {"w": [1.0, 1.0, 1.0], "b": [2.0, 2.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        state = worker.ask("state")
        assert (state["values"], state["global_step"]) == ({"w": [-1.0, 0.0, 1.0], "b": [3.0, 4.0]}, 1)
    step_all(workers, {"b": [2.0, 2.0]}, {"w": [4.0, 4.0, 4.0]})
    for worker in workers:
        state = worker.ask("state")
        assert (state["values"], state["global_step"]) == ({"w": [-3.0, -2.0, -1.0], "b": [2.0, 3.0]}, 2)


def test_a_gradient_of_none_on_all_workers_leaves_the_variable_alone(cluster: Cluster) -> None:
    cluster.serve(2)
    largest = float(np.finfo(np.float32).max)  # the sum of two is infinite
    workers = optimizing(cluster, {"initial": {**START, "b": [largest, 5.0]}}, {})
    start_all(workers)
    step_all(workers, {"w": [1.0, 1.0, 1.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        assert worker.ask("state")["values"] == {"w": [-1.0, 0.0, 1.0], "b": [largest, 5.0]}
    # But a changed variable is averaged: unlike the original, this optimizer compares the bytes.
    for worker, value in zip(workers, (10.0, 20.0), strict=True):
        worker.ask("assign", b=[value, value])
    step_all(workers, {"w": [1.0, 1.0, 1.0]}, {"w": [3.0, 3.0, 3.0]})
    for worker in workers:
        assert worker.ask("state")["values"] == {"w": [-3.0, -2.0, -1.0], "b": [15.0, 15.0]}
    assert np.frombuffer(cluster.client.pull()[1], np.float32).tolist()[-2:] == [15.0, 15.0]
    assert cluster.client.status().global_step == 2


OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.1}}
SLOTS = {"SGD": ["momentum_buffer"], "Adam": ["exp_avg", "exp_avg_sq", "step"]}


class Reference:
    """torch's own optimizer, without a wrapper."""

    def __init__(self, optimizer: str) -> None:
        self.parameters = {name: torch.nn.Parameter(torch.tensor(values)) for name, values in START.items()}
        self._opt = getattr(torch.optim, optimizer)(self.parameters.values(), **OPTIMIZERS[optimizer])

    def step(self, gradients: Values) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        self._opt.step()

    def values(self) -> Values:
        return {name: parameter.tolist() for name, parameter in self.parameters.items()}

    def slots(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {
            name: {slot: self._opt.state[parameter][slot].tolist() for slot in names}
            for name, parameter in self.parameters.items()
        }


@torch.no_grad()
def average(one: Reference, other: Reference) -> None:
    for ours, theirs in zip(one.parameters.values(), other.parameters.values(), strict=True):
        ours.copy_((ours + theirs) / 2)
        theirs.copy_(ours)


def gradients_of(worker: int, local_step: int) -> Values:
    """Gradients that differ for every worker and step."""
    chance = np.random.default_rng((worker, local_step))
    return {name: chance.random(len(values), np.float32).tolist() for name, values in START.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_slots_and_local_step_stay_local_and_are_kept_across_rounds(cluster: Cluster, optimizer: str) -> None:
    intervals, rounds = (1, 3), 3
    cluster.serve(2)
    settings = {"optimizer": optimizer, "settings": OPTIMIZERS[optimizer]}
    workers = optimizing(cluster, *({**settings, "interval_steps": interval} for interval in intervals))
    start_all(workers)
    references = [Reference(optimizer), Reference(optimizer)]
    for round_ in range(rounds):
        for index, (worker, reference, interval) in enumerate(zip(workers, references, intervals, strict=True)):
            for step in range(round_ * interval, (round_ + 1) * interval):
                reference.step(gradients_of(index, step))
                worker.send("step", **gradients_of(index, step))
                if step + 1 < (round_ + 1) * interval:
                    worker.answer()
        for worker in workers:
            worker.answer()
        average(*references)
        states = [worker.ask("state") for worker in workers]
        for state, reference, interval in zip(states, references, intervals, strict=True):
            assert state["values"] == reference.values()
            assert state["slots"] == reference.slots(SLOTS[optimizer])
            assert (state["local_step"], state["global_step"]) == ((round_ + 1) * interval, round_ + 1)
        assert states[0]["slots"] != states[1]["slots"]


def test_shapes_that_differ_are_named_at_the_start_of_an_optimizer(cluster: Cluster) -> None:
    cluster.serve(2)
    chief, other = optimizing(cluster, {}, {"initial": {**START, "b": [1.0, 2.0, 3.0]}})
    chief.ask("start")
    assert mismatch(other, "start") == (
        "variable 'b' is float32[3] here but float32[2] in the center; give all workers the same model"
    )


def test_a_restarted_optimizer_goes_on_from_the_center(cluster: Cluster) -> None:
    cluster.serve(2)
    (killed,) = optimizing(cluster, {})
    (other,) = cluster.join(1, shapes={name: (len(values),) for name, values in START.items()})
    start_all([killed, other])
    killed.send("step", w=[1.0, 1.0, 1.0])
    other.push(6)
    killed.answer()
    center = {"w": [3.5, 7.5, 11.5], "b": [7.0, 11.0]}
    assert killed.ask("state")["values"] == center
    killed.kill()
    other.begin_push(6)
    cluster.waits(1)
    (restarted,) = optimizing(cluster, {"initial": {"w": [9.0] * 3, "b": [9.0] * 2}})
    restarted.ask("start")
    state = restarted.ask("state")
    assert (state["values"], state["global_step"], state["local_step"]) == (center, 1, 0)
    restarted.ask("step", b=[2.0, 4.0])
    state = restarted.ask("state")
    assert (state["values"], state["global_step"]) == ({"w": [6.5, 13.5, 20.5], "b": [9.0, 15.0]}, 2)
    assert other.pushed().global_step == 2
