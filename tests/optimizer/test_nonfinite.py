"""Local variables that are NaN or infinite at a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from modelaverage.errors import InvalidRequestError
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Net, Worker, center_of, start_all, together

pytestmark = pytest.mark.in_memory


def adam(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.5)


def pair(start_server: StartServer, join: Join, **options: Any) -> list[Worker]:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, **options) for index in range(2)]
    start_all(workers)
    return workers


def both(workers: list[Worker], first: float, second: float) -> None:
    together(lambda: workers[0].step(w=first, b=1.0), lambda: workers[1].step(w=second, b=1.0))


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "event", None) == name]


def test_by_default_they_go_into_the_average_and_the_log_says_so_once(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    workers = pair(start_server, join)
    for _ in range(2):
        both(workers, math.nan, 1.0)
    assert all(math.isnan(value) for worker in workers for value in worker.values()["w"])
    assert sum("of the last push are not finite" in record.getMessage() for record in caplog.records) == 2  # per worker


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_worker_that_abstains_poisons_nobody_and_goes_on_from_the_center(
    value: float, start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    workers = pair(start_server, join, nonfinite="abstain")
    both(workers, value, 4.0)
    assert [worker.values() for worker in workers] == [{"w": [-3.0] * 3, "b": [1.0] * 3}] * 2
    assert workers[0].opt.last_round is not None
    assert workers[0].opt.last_round.contributors == ("worker-1",)
    both(workers, 1.0, 3.0)
    assert [worker.values()["w"] for worker in workers] == [[-5.0] * 3] * 2
    (said,) = (record for record in caplog.records if "abstains" in record.getMessage())
    assert said.getMessage() == (
        "3 values of 'w' are not finite (NaN, infinite) at local step 1; worker-0 abstains from the average and goes "
        "on from the center"
    )


def test_a_warning_comes_once_for_an_episode(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    workers = pair(start_server, join, nonfinite="abstain")
    for value in (math.nan, math.nan, 1.0, math.nan):
        both(workers, value, 1.0)
    assert sum("abstains" in record.getMessage() for record in caplog.records) == 2


def test_a_state_that_was_poisoned_begins_again(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    workers = pair(start_server, join, nonfinite="abstain", local=adam)
    both(workers, 1.0, 1.0)
    both(workers, math.nan, 1.0)
    w, b = workers[0].model.parameters()
    assert (len(workers[0].local.state[w]), len(workers[0].local.state[b])) == (0, 3)
    assert "local optimizer's state of 'w' was not finite, and begins again" in caplog.text
    both(workers, 1.0, 1.0)
    assert all(math.isfinite(value) for value in workers[0].values()["w"])
    assert workers[0].opt.last_round is not None
    assert workers[0].opt.last_round.contributors == ("worker-0", "worker-1")


def test_if_all_abstain_the_center_stays_and_the_round_counts(start_server: StartServer, join: Join) -> None:
    workers = pair(start_server, join, nonfinite="abstain")
    both(workers, math.nan, math.inf)
    assert [worker.values()["w"] for worker in workers] == [[1.0] * 3] * 2
    assert [worker.opt.global_step for worker in workers] == [1, 1]


def test_a_center_that_is_not_finite_itself_ends_the_training_of_a_worker_that_would_abstain(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(1)
    worker = join(server, nonfinite="abstain")
    with torch.no_grad():
        dict(worker.model.named_parameters())["w"][1] = math.nan
    worker.start()
    with pytest.raises(InvalidRequestError, match="1 values of 'w' are not finite in the center itself"):
        worker.step(w=1.0)


def test_raise_ends_the_step_before_anything_is_pushed(start_server: StartServer, join: Join) -> None:
    server = start_server(1)
    worker = join(server, nonfinite="raise")
    worker.start()
    worker.step(w=1.0)
    with pytest.raises(
        InvalidRequestError, match=r"worker-0: 3 values of 'w' are not finite .* at local step 2; nothing"
    ):
        worker.step(w=math.nan)
    assert worker.opt.global_step == 1
    np.testing.assert_array_equal(center_of(server)["w"], np.zeros(3, np.float32))


def test_a_policy_that_does_not_exist_is_refused_at_once(start_server: StartServer, join: Join) -> None:
    with pytest.raises(ValueError, match="nonfinite is 'skip'; choose one of allow, abstain, raise"):
        join(start_server(1), nonfinite="skip")


class Masked(Net):
    """With a buffer that is infinite on purpose, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))


@pytest.mark.parametrize("policy", ["abstain", "raise"])
def test_a_mask_of_infinities_is_no_reason_to_abstain(policy: str, alone: Join) -> None:
    worker = alone(Masked(), nonfinite=policy)
    for _ in range(2):
        worker.step(w=1.0, b=1.0)
        assert worker.opt.last_round is not None
        assert worker.opt.last_round.contributors == ("worker-0",)


def test_a_worker_with_a_mask_abstains_because_of_the_rest(alone: Join) -> None:
    worker = alone(Masked(), nonfinite="abstain")
    worker.step(w=math.nan, b=1.0)
    assert worker.values() == {"w": [1.0] * 3, "b": [2.0] * 3}
    assert worker.opt.last_round is not None
    assert worker.opt.last_round.contributors == ()


def test_a_frozen_parameter_that_is_nan_in_the_center_ends_the_training(alone: Join) -> None:
    worker = alone(Net(b=math.nan), nonfinite="abstain")
    with pytest.raises(InvalidRequestError, match="3 values of 'b' are not finite in the center itself"):
        worker.step(w=math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_whose_sum_overflows_are_finite_all_the_same(dtype: torch.dtype, alone: Join) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        model.w.fill_(torch.finfo(dtype).max)
    worker = alone(model, nonfinite="raise")
    worker.step(b=1.0, w=0.0)
    assert worker.opt.global_step == 1


def test_state_of_parameters_that_were_replaced_in_the_groups_begins_again(
    start_server: StartServer, join: Join
) -> None:
    # As accelerate does it when it shards a model: in the lists, which no assignment shows.
    workers = pair(start_server, join, nonfinite="abstain", local=adam)
    model, local = workers[0].model, workers[0].local
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, torch.nn.Parameter(parameter.detach().clone()))
    (group,) = local.param_groups
    group["params"][:] = list(model.parameters())
    both(workers, 1.0, 1.0)
    together(lambda: workers[0].step(w=math.nan, b=math.nan), lambda: workers[1].step(w=1.0, b=1.0))
    assert [len(local.state[parameter]) for parameter in model.parameters()] == [0, 0]


def test_dropped_state_is_logged_once_for_an_episode(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    workers = pair(start_server, join, nonfinite="abstain", local=adam)
    for value in (math.nan, math.nan, 1.0, math.nan):
        both(workers, value, 1.0)
    assert sum("begins again" in record.getMessage() for record in caplog.records) == 2
