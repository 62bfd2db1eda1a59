"""The weight of a worker's pushes: a number, or a count since the last round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession, PushResult
from modelaverage.errors import InvalidRequestError, ServerUnavailableError
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Worker, start_all, together

pytestmark = pytest.mark.in_memory


class Counter:
    """Counts samples, and restarts the count when it is asked."""

    def __init__(self, count: float = 0.0) -> None:
        self.count = count

    def __call__(self) -> float:
        counted, self.count = self.count, 0.0
        return counted


class FailsOnce(ParameterServerSession):
    """A session whose first push does not reach the server."""

    has_failed = False

    def push_and_average(self, variables: Mapping[str, Any], weight: float = 1.0, **options: Any) -> PushResult:
        if not self.has_failed:
            self.has_failed = True
            raise ServerUnavailableError("it is away")
        return super().push_and_average(variables, weight, **options)


def pair(start_server: StartServer, join: Join, *options: dict[str, Any]) -> list[Worker]:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, **options[index]) for index in range(2)]
    start_all(workers)
    return workers


def test_a_number_weighs_every_push(start_server: StartServer, join: Join) -> None:
    first, second = pair(start_server, join, {"weight": 3}, {})
    for step in range(1, 3):
        together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
        assert first.values()["w"] == second.values()["w"] == [1.0 - 5.0 * step] * 3  # (3 * 4 + 8) / 4


def test_a_function_is_asked_once_for_each_round(start_server: StartServer, join: Join) -> None:
    tokens = Counter(), Counter()
    first, second = pair(start_server, join, *({"weight": each} for each in tokens))
    expected = 1.0
    for counts in ((30.0, 10.0), (1.0, 1.0), (0.5, 1.5)):
        for each, count in zip(tokens, counts, strict=True):
            each.count = count
        together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
        expected -= (counts[0] * 4 + counts[1] * 8) / sum(counts)
        assert first.values()["w"] == second.values()["w"] == [expected] * 3


def test_a_worker_that_has_counted_nothing_is_not_in_the_average(start_server: StartServer, join: Join) -> None:
    first, second = pair(start_server, join, {"weight": Counter()}, {})
    together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
    assert first.values()["w"] == second.values()["w"] == [-7.0] * 3
    assert first.opt.last_round is not None
    assert first.opt.last_round.contributors == ("worker-1",)


def test_what_was_counted_for_a_round_that_failed_counts_for_the_next(start_server: StartServer, join: Join) -> None:
    tokens = Counter()
    first, second = pair(start_server, join, {"weight": tokens, "session_class": FailsOnce}, {})
    tokens.count = 2.0
    with pytest.raises(ServerUnavailableError):
        first.step(w=4.0)
    tokens.count = 1.0
    together(lambda: first.step(w=5.0), lambda: second.step(w=1.0))
    assert second.values()["w"] == [1.0 - (3.0 * 9.0 + 1.0) / 4.0] * 3  # 2 and 1 of the first worker


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e10, float("nan")])
def test_a_number_out_of_range_is_refused_at_once(weight: float, start_server: StartServer, join: Join) -> None:
    with pytest.raises(InvalidRequestError, match=r"weight .* is not usable; give a number from 1e-09 to 1e[+]09"):
        join(start_server(1), weight=weight)


@pytest.mark.parametrize("weight", ["1", None, True])
def test_what_is_no_weight_is_refused_at_once(weight: Any, start_server: StartServer, join: Join) -> None:
    with pytest.raises(TypeError, match=r"weight is .*; give a number, or a function that returns one"):
        join(start_server(1), weight=weight)


@pytest.mark.parametrize("weight", [np.float32(3.0), np.int64(3), lambda: np.float32(3.0)])
def test_numbers_of_numpy_are_weights(weight: Any, start_server: StartServer, join: Join) -> None:
    first, second = pair(start_server, join, {"weight": weight}, {})
    together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
    assert first.values()["w"] == [-4.0] * 3


@pytest.mark.parametrize("told", ["many", None])
def test_a_function_that_returns_no_number_is_refused(told: Any, alone: Join) -> None:
    worker = alone(weight=lambda: told)
    with pytest.raises(InvalidRequestError, match=f"worker-0: the weight function returned {told!r}, which is not a"):
        worker.step(w=4.0)


def test_a_function_that_fails_leaves_the_round_to_be_made_again(alone: Join) -> None:
    tokens = Counter(-1.0)
    worker = alone(weight=tokens)
    with pytest.raises(InvalidRequestError, match="worker-0: weight -1 is not usable"):
        worker.step(w=4.0)
    assert worker.values()["w"] == [-3.0] * 3
    tokens.count = 2.0
    worker.opt.average()
    assert worker.opt.global_step == 1
