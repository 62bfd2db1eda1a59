"""GradScaler around the optimizer: skipped updates count as steps, and the numbers are those of the local optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ma_client import ModelAverageOptimizer
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Net, Worker, start_all, together

pytestmark = pytest.mark.in_memory

Local = Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]
LOCALS: dict[str, Local] = {
    "SGD": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
    "Adam": lambda own: torch.optim.Adam(own, lr=0.1),
    "Adam, fused": lambda own: torch.optim.Adam(own, lr=0.1, fused=True),
    "SGD, fused": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, fused=True),
}
INFINITE = float("inf")


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaling: torch.amp.GradScaler,
    factors: list[float],
    unscale: bool = False,
) -> list[float]:
    """Steps of training whose loss has these factors; the scales after each."""
    scales = []
    for factor in factors:
        optimizer.zero_grad()
        loss = model(torch.arange(3.0)).square().sum() * factor
        scaling.scale(loss).backward()
        if unscale:
            scaling.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaling.step(optimizer)
        scaling.update()
        scales.append(scaling.get_scale())
    return scales


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled and clipped before"])
@pytest.mark.parametrize("name", LOCALS)
def test_parameters_state_and_scale_are_those_of_the_local_optimizer_alone(
    name: str, unscale: bool, alone: Join
) -> None:
    worker, plain = alone(local=LOCALS[name], interval_steps=2), Net()
    alone_optimizer = LOCALS[name](plain.parameters())
    factors = [1.0, INFINITE, 0.3, 0.7, float("nan"), 1.1, 0.9]
    scales = train(worker.model, worker.opt, scaler(), factors, unscale)
    assert scales == train(plain, alone_optimizer, scaler(), factors, unscale)
    assert worker.values() == {n: parameter.tolist() for n, parameter in plain.named_parameters()}
    for ours, theirs in zip(worker.local.state.values(), alone_optimizer.state.values(), strict=True):
        assert {key: value.tolist() for key, value in ours.items()} == {
            key: value.tolist() for key, value in theirs.items()
        }
    assert (worker.opt.local_step, worker.opt.global_step) == (7, 3)


@pytest.mark.parametrize("name", LOCALS)
def test_a_step_that_the_grad_scaler_skips_counts_and_changes_nothing(name: str, alone: Join) -> None:
    worker = alone(local=LOCALS[name])
    before = worker.values()
    train(worker.model, worker.opt, scaler(), [INFINITE])
    assert worker.values() == before
    assert (worker.opt.local_step, worker.opt.global_step) == (1, 1)


def test_nothing_of_the_scaler_stays_on_either_optimizer(alone: Join) -> None:
    worker = alone(local=LOCALS["Adam, fused"])
    train(worker.model, worker.opt, scaler(), [1.0, INFINITE])
    for optimizer in (worker.opt, worker.local):
        assert {"grad_scale", "found_inf"}.isdisjoint(vars(optimizer))


def test_workers_that_skip_different_numbers_of_steps_end_together(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, interval_steps=2) for index in range(2)]

    def run(worker: Worker, factors: list[float]) -> None:
        with worker.opt.make_session_run_hook():
            train(worker.model, worker.opt, scaler(), factors)

    together(lambda: run(workers[0], [INFINITE] + [0.1] * 5), lambda: run(workers[1], [0.1] * 6))
    assert [(worker.opt.local_step, worker.opt.global_step) for worker in workers] == [(6, 3)] * 2
    assert workers[0].values() == workers[1].values()


def test_a_scaler_that_is_not_enabled_changes_nothing(alone: Join) -> None:
    worker = alone()
    train(worker.model, worker.opt, torch.amp.GradScaler("cpu", enabled=False), [0.0, 0.0])
    assert worker.opt.local_step == 2


class WantsScaler(torch.optim.SGD):
    """The older interface: GradScaler passes itself as a keyword, or the optimizer does without it."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:  # type: ignore[override]
        assert grad_scaler is None
        super().step(closure)


def test_a_local_optimizer_that_asks_for_the_scaler_gets_unscaled_gradients(alone: Join) -> None:
    worker = alone(local=lambda own: WantsScaler(own, lr=1.0))
    other = alone(local=lambda own: torch.optim.SGD(own, lr=1.0))
    for each in (worker, other):
        train(each.model, each.opt, scaler(), [0.1, INFINITE, 0.1])
    assert worker.values() == other.values()


def test_float16_gradients_are_refused_as_grad_scaler_refuses_them(alone: Join) -> None:
    worker = alone(Net().half())
    scaling = scaler()
    scaling.scale(worker.model(torch.ones(3).half()).sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaling.step(worker.opt)
    assert worker.opt.local_step == 0


def test_a_skipped_update_touches_nothing(start_server: StartServer, join: Join) -> None:
    server = start_server(3)
    value = 0.1  # in float32, three of them added and divided by 3 are a different number
    workers = [join(server, Net(b=value), index=index, num_worker=3) for index in range(3)]
    start_all(workers)
    together(*(lambda worker=worker: train(worker.model, worker.opt, scaler(), [INFINITE]) for worker in workers))
    assert workers[0].values()["b"] == torch.full((3,), value).tolist()


def test_gradients_scaled_by_hand_reach_a_local_optimizer_that_unscales(alone: Join) -> None:
    worker, plain = alone(local=LOCALS["Adam, fused"]), Net()
    alone_optimizer = LOCALS["Adam, fused"](plain.parameters())
    for model, optimizer in ((worker.model, worker.opt), (plain, alone_optimizer)):
        assert isinstance(optimizer, ModelAverageOptimizer | torch.optim.Adam)
        model(torch.arange(3.0)).sum().backward()
        optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[union-attr]
        optimizer.step()
    assert worker.values() == {n: parameter.tolist() for n, parameter in plain.named_parameters()}
