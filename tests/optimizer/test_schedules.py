"""A schedule is a file and a line: this toy installs each average a step late and keeps the training meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from ma_client import PushResult
from ma_client.torch.rounds import OwnContribution, Rounds
from ma_client.torch.settings import OptimizerSettings
from ma_client.torch.training import parts
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Worker, start_all, together

pytestmark = pytest.mark.in_memory


class OneStepLate:
    """Pushes at the interval; installs after the next step, or when it has to."""

    def __init__(self, rounds: Rounds, interval_steps: int) -> None:
        self._rounds = rounds
        self._interval_steps = interval_steps
        self.under_way: tuple[PushResult, OwnContribution] | None = None

    def after_step(self, local_step: int, loss: float | torch.Tensor | None) -> None:
        self.wait()
        if local_step % self._interval_steps == 0:
            self._rounds.note_loss(loss)
            self._push()

    def average(self) -> None:
        self.wait()
        self._push()
        self.wait()

    def wait(self) -> None:
        if self.under_way is None:
            return
        (result, given), self.under_way = self.under_way, None
        now: Mapping[str, Any] = self._rounds.replica.variables.gather()
        center = {name: array + (now[name] - given.values[name]) for name, array in result.center.items()}
        self._rounds.install(replace(result, center=center), given)

    def _push(self) -> None:
        given = self._rounds.gather()
        given = replace(given, values={name: array.copy() for name, array in given.values.items()})
        self.under_way = self._rounds.push(given), given


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[OneStepLate]:
    """The schedules that optimizers were made with."""
    schedules = list[OneStepLate]()

    def schedule_for(settings: OptimizerSettings, rounds: Rounds) -> OneStepLate:
        schedules.append(OneStepLate(rounds, settings.interval_steps))
        return schedules[-1]

    monkeypatch.setattr(parts, "schedule_for", schedule_for)
    return schedules


def test_what_was_trained_during_a_round_is_kept_and_comes_into_the_next(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, interval_steps=2) for index in range(2)]
    start_all(workers)

    def train(worker: Worker, gradient: float) -> None:
        for _ in range(3):
            worker.step(w=gradient)

    together(lambda: train(workers[0], 1.0), lambda: train(workers[1], 3.0))
    # After two steps -1 and -5, whose average is -3; the third step comes on top.
    assert [worker.values()["w"] for worker in workers] == [[-4.0] * 3, [-6.0] * 3]
    assert [worker.opt.state_dict()["model_average"]["steps_since_round"] for worker in workers] == [1, 1]
    together(*(worker.opt.finish for worker in workers))
    assert [worker.values()["w"] for worker in workers] == [[-5.0] * 3] * 2


ENDS: dict[str, Callable[[Worker], Any]] = {
    "state_dict": lambda worker: worker.opt.state_dict(),
    "load_state_dict": lambda worker: worker.opt.load_state_dict(worker.local.state_dict()),
    "get_init_op": lambda worker: worker.opt.get_init_op()(),
    "finish": lambda worker: worker.opt.finish(final_round=False),
}


@pytest.mark.parametrize("call", ENDS)
def test_a_round_under_way_ends_before_its_state_is_used(call: str, alone: Join, made: list[OneStepLate]) -> None:
    worker = alone()
    worker.step(w=1.0)
    assert made[0].under_way is not None
    assert worker.opt.last_round is None
    ENDS[call](worker)
    assert made[0].under_way is None
    assert worker.opt.last_round is not None
