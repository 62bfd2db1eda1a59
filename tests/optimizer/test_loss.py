"""The loss that a worker reports is in the status; a worker that reports none pays nothing for it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.optimizer.workers import Join, Worker

pytestmark = pytest.mark.in_memory


def loss_in_status(worker: Worker) -> float | None:
    (found,) = worker.session.status().workers
    return found.loss if found.HasField("loss") else None


def test_a_closures_loss_is_reported(alone: Join) -> None:
    worker = alone()

    def closure() -> torch.Tensor:
        worker.opt.zero_grad()
        loss: torch.Tensor = sum((p.square().sum() for p in worker.model.parameters()), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = worker.opt.step(closure)  # type: ignore[arg-type]
    assert loss_in_status(worker) == float(loss.detach())  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", [0.25, math.inf])
def test_a_loss_that_was_set_is_reported(alone: Join, loss: float) -> None:
    worker = alone()
    worker.opt.loss = loss
    worker.opt.average()
    assert loss_in_status(worker) == loss


def test_without_a_loss_none_is_reported(alone: Join) -> None:
    worker = alone()
    worker.opt.average()
    assert loss_in_status(worker) is None
