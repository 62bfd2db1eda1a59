"""How sessions name the outer optimizer of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import ConflictError, InvalidRequestError, OuterAdam, OuterAverage, OuterSGD, ParameterServerSession
from modelaverage.chosen import NOTHING_CHOSEN
from modelaverage.errors import Reason
from modelaverage.outer import OuterOptimizer
from tests.conftest import StartServer
from tests.many_sessions import ManySessions
from tests.optimizer.workers import together

pytestmark = pytest.mark.in_memory

DILOCO = OuterSGD(lr=0.7, momentum=0.9, nesterov=True)
DILOCO_TEXT = "sgd:lr=0.7,momentum=0.9,nesterov"
START: dict[str, NDArray[Any]] = {"w": np.arange(100, dtype=np.float32), "b": np.ones(3)}


@pytest.fixture(params=[1, 3])
def job(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[ManySessions]:
    with ExitStack() as sessions:
        yield ManySessions([start_server(1) for _ in range(request.param)], sessions)


def test_the_chief_chooses_the_outer_optimizer_and_everybody_is_told(job: ManySessions) -> None:
    chief, other = job.worker(0), job.worker(1)
    assert chief.outer_optimizer is None
    chief.initialize(START, outer_optimizer=DILOCO)
    assert chief.outer_optimizer == DILOCO_TEXT
    other.pull()
    assert other.outer_optimizer == DILOCO_TEXT
    assert {status.outer_optimizer for status in chief.statuses()} == {DILOCO_TEXT}
    other.pull(outer_optimizer=DILOCO)
    other.pull(outer_optimizer="sgd:nesterov,momentum=0.9,lr=7e-1")


def test_without_a_choice_the_center_is_the_plain_average(job: ManySessions) -> None:
    chief = job.worker(0)
    chief.initialize(START)
    assert chief.outer_optimizer == "average"
    chief.pull(outer_optimizer=OuterAverage())
    assert {status.outer_optimizer for status in chief.statuses()} == {""}


@pytest.mark.parametrize("wrong", [OuterAverage(), OuterSGD(lr=0.7, momentum=0.8, nesterov=True), OuterAdam(lr=0.1)])
def test_a_worker_that_names_another_is_refused_with_both_named(wrong: OuterOptimizer, job: ManySessions) -> None:
    chief, other = job.worker(0), job.worker(1)
    chief.initialize(START, outer_optimizer=DILOCO)
    for refused in (other.pull, lambda **named: job.worker(0).initialize(START, **named)):
        with pytest.raises(
            ConflictError, match=f"has the outer optimizer {DILOCO_TEXT}, .* names {wrong.name}"
        ) as caught:
            refused(outer_optimizer=wrong)
        assert caught.value.reason is Reason.OUTER_OPTIMIZER_MISMATCH
        assert any(address in str(caught.value) for address in job.addresses)
    other.pull()  # the refusals have changed nothing
    assert other.base_step == 0


def test_a_chief_that_names_none_goes_along_with_the_center(job: ManySessions) -> None:
    job.worker(0).initialize(START, outer_optimizer=DILOCO)
    again = job.worker(0)
    assert not again.initialize(START).initialized
    assert again.outer_optimizer == DILOCO_TEXT


@pytest.mark.parametrize("named", [DILOCO, None])
def test_an_interrupted_initialization_is_completed_with_the_same_outer_optimizer(
    named: OuterOptimizer | None, start_server: StartServer
) -> None:
    servers = [start_server(1) for _ in range(3)]
    addresses = [server.address for server in servers]

    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        _, *others = chief._servers  # the chief dies between two servers

        def die(*_: Any) -> Any:
            raise KeyboardInterrupt

        for server in others:
            server.initialize = die  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            chief.initialize(START, outer_optimizer=DILOCO)
    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        with pytest.raises(ConflictError, match="has the outer optimizer"):
            chief.initialize(START, outer_optimizer=OuterAverage())
        assert chief.initialize(START, outer_optimizer=named).initialized
        assert {status.outer_optimizer for status in chief.statuses()} == {DILOCO_TEXT}


def test_a_server_that_knows_only_the_average_is_found_out(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("initialization", "service"):
        monkeypatch.setattr(f"ps_server.flow.{module}.named", lambda _: NOTHING_CHOSEN)
    server = start_server(1)
    with ParameterServerSession([server.address], worker_id="a", is_chief=True) as chief:
        with pytest.raises(ConflictError, match=r"has the outer optimizer average, .* names sgd:.* must be updated"):
            chief.initialize(START, outer_optimizer=DILOCO)
        with pytest.raises(ConflictError, match="must be updated"):
            chief.pull(outer_optimizer=DILOCO)


def test_what_is_no_outer_optimizer_is_refused_before_anything_is_sent(job: ManySessions) -> None:
    chief = job.worker(0)
    with pytest.raises(InvalidRequestError, match="outer optimizer 'yogi' is not known here") as caught:
        chief.initialize(START, outer_optimizer="yogi")
    assert caught.value.reason is Reason.OUTER_OPTIMIZER_INVALID
    with pytest.raises(TypeError, match=r"outer_optimizer is 0\.7; give an outer optimizer such as OuterSGD"):
        chief.initialize(START, outer_optimizer=0.7)  # type: ignore[arg-type]
    assert chief.initialize(START).initialized


def test_rounds_take_the_outer_step(job: ManySessions) -> None:
    worker = job.worker(0)
    worker.initialize({"w": np.zeros(1000)}, outer_optimizer=DILOCO)
    center, momentum = np.zeros(1000), np.zeros(1000)
    for number in range(1, 6):
        local = center + number
        moved = center - local
        momentum = 0.9 * momentum + moved
        center = center - 0.7 * (moved + 0.9 * momentum)
        given = worker.push_and_average({"w": local}).center["w"]
        np.testing.assert_array_equal(given, center)


# Abstaining.


def test_a_push_with_weight_0_counts_at_the_barrier_and_not_in_the_average(start_server: StartServer) -> None:
    server = start_server(2)
    workers = [ParameterServerSession([server.address], worker_id=name, is_chief=name == "a") for name in "ab"]
    with workers[0] as gives, workers[1] as abstains:
        gives.initialize({"w": np.zeros(5)})
        for worker in workers:
            worker.pull()
        results = together(
            lambda: gives.push_and_average({"w": np.full(5, 3.0)}),
            lambda: abstains.push_and_average({"w": np.full(5, np.nan)}, 0, local_step=7, loss=0.5),
        )
        for result in results:
            np.testing.assert_array_equal(result.center["w"], np.full(5, 3.0))
            assert result.contributors == ("a",)
        shown = {each.worker_id: each for each in gives.status().workers}["b"]
        assert (shown.local_step, shown.loss, shown.nonfinite_values) == (7, 0.5, 0)


def test_if_all_abstain_the_center_stays_and_the_round_counts(job: ManySessions) -> None:
    worker = job.worker(0)
    worker.initialize(START, outer_optimizer=DILOCO)
    result = worker.push_and_average({name: array + 1 for name, array in START.items()}, weight=0)
    assert result.global_step == 1
    assert {name: array.tobytes() for name, array in result.center.items()} == {
        n: a.tobytes() for n, a in START.items()
    }


def test_servers_that_have_different_ones_are_named(start_server: StartServer) -> None:
    addresses = [start_server(1).address for _ in range(2)]
    with ParameterServerSession(addresses, worker_id="a", is_chief=True) as chief:
        chief.initialize(START, outer_optimizer=DILOCO)
        _, other = chief._servers
        asked = other.center_header

        def says_another(*arguments: Any) -> Any:
            header = asked(*arguments)
            header.outer_optimizer = "sgd:lr=1.0,momentum=0.5"
            return header

        other.center_header = says_another  # type: ignore[method-assign, assignment]
        said = (
            rf"{addresses[1]} has the outer optimizer sgd:lr=1.0,momentum=0.5, that at {addresses[0]} has {DILOCO_TEXT}"
        )
        for call in (chief.pull, lambda: chief.initialize(START)):
            with pytest.raises(ConflictError, match=said):
                call()
