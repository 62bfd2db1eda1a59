"""Training goes on while a round is under way, and what was trained meanwhile is kept on top of its average."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from ma_client import (
    DeadlineExceededError,
    ModelAverageError,
    Outcome,
    OuterSGD,
    ParameterServerSession,
    PushResult,
)
from ma_client.job.ticket import PushTicket
from modelaverage.errors import RetryPushError
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.optimizer.workers import TIMEOUT_S, Join, Running, center_of, start_all, together
from tests.raw_client import until

pytestmark = pytest.mark.in_memory


def under_way(worker: Any) -> bool:
    """Whether the round of this worker has begun and is not over."""
    schedule = worker.opt._training.schedule
    return schedule._under_way is not None and not schedule._under_way.ticket.done


def test_step_returns_while_others_have_not_pushed_and_the_average_comes_under_what_was_trained_meanwhile(
    start_server: StartServer, join: Join
) -> None:
    first, second = two(start_server, join, interval_steps=2, overlap_steps=2)
    for _ in range(2):
        first.step(w=1.0, b=0.0)  # w 1 -> -1, pushed
    assert under_way(first)
    first.step(w=10.0)  # -1 -> -11, meanwhile
    assert under_way(first)
    assert first.values()["w"] == [-11.0] * 3
    for _ in range(2):
        second.step(w=3.0, b=0.0)  # 1 -> -5, pushed: the average is -3
    until(lambda: not under_way(first), "the round is over")
    first.opt.wait()
    second.opt.wait()
    assert second.values()["w"] == [-3.0] * 3
    assert first.values()["w"] == [-13.0] * 3  # the average, less 10
    assert (first.opt.global_step, first.opt.local_step) == (1, 3)


def test_an_average_that_is_there_is_installed_after_the_next_step(start_server: StartServer, join: Join) -> None:
    first, second = two(start_server, join, interval_steps=3, overlap_steps=3)
    for _ in range(3):
        first.step(w=1.0)
        second.step(w=3.0)
    until(lambda: not under_way(first), "the round is over")
    assert first.values()["w"] == [-2.0] * 3
    first.step(w=1.0)
    assert first.values()["w"] == [-6.0] * 3  # the average is -5
    assert first.opt.global_step == 1


def test_step_waits_when_the_overlap_is_over(start_server: StartServer, join: Join) -> None:
    first, second = two(start_server, join, interval_steps=4, overlap_steps=2)
    for _ in range(5):
        first.step(w=1.0)
    assert under_way(first)
    waiting = Running(lambda: first.step(w=1.0))
    assert not waiting.finishes_within(0.2)
    for _ in range(4):
        second.step(w=1.0)
    waiting.result()
    assert first.opt.global_step == 1
    assert first.values()["w"] == [-5.0] * 3


def test_the_next_round_begins_when_the_one_before_is_installed(start_server: StartServer, join: Join) -> None:
    workers = two(start_server, join, interval_steps=1, overlap_steps=1)

    def train(worker: Any, gradient: float) -> None:
        for _ in range(5):
            worker.step(w=gradient)
        worker.opt.wait()

    together(lambda: train(workers[0], 1.0), lambda: train(workers[1], 3.0))
    assert [worker.opt.global_step for worker in workers] == [5, 5]
    assert workers[0].values() == workers[1].values() == {"w": [-9.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize("compression", ["none", "int4"])
def test_with_an_outer_optimizer_and_a_codec_all_workers_end_with_the_same_bits(
    start_server: StartServer, join: Join, compression: str
) -> None:
    server = start_server(2)
    workers = [
        join(
            server,
            index=rank,
            num_worker=2,
            interval_steps=2,
            overlap_steps=1,
            outer_optimizer=OuterSGD(lr=0.7, momentum=0.9, nesterov=True),
            compression=compression,
        )
        for rank in range(2)
    ]
    start_all(workers)

    def train(worker: Any, rank: int) -> None:
        for step in range(20):
            worker.step(w=0.1 * step + rank, b=0.5)
        worker.opt.average()

    together(*(lambda w=worker, r=rank: train(w, r) for rank, worker in enumerate(workers)))
    assert workers[0].values() == workers[1].values()
    center = center_of(server)
    assert {name: list(array) for name, array in center.items()} == workers[0].values()


def test_a_variable_that_did_not_move_meanwhile_gets_the_center_bit_for_bit(
    start_server: StartServer, join: Join
) -> None:
    (worker,) = alone(start_server, join, interval_steps=1, overlap_steps=1)
    with torch.no_grad():
        worker.model.b.copy_(torch.tensor([-0.0, 1e-45, 3.0]))
    worker.step(w=1.0)
    worker.step(w=1.0)
    worker.opt.wait()
    assert worker.model.b.detach().numpy().tobytes() == np.array([-0.0, 1e-45, 3.0], np.float32).tobytes()


def test_sixteen_bit_variables_are_moved_in_float32() -> None:
    from ma_client.torch.rounds import moved

    center, before, now = (np.array([x], np.float16) for x in (1.0, 1000.0, 1000.5))
    assert moved(center, before, now) == np.float16(1.5)
    assert moved(center, before, now).dtype == np.float16


def test_a_failed_round_is_raised_by_a_later_step_and_leaves_the_local_variables(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two(start_server, join, interval_steps=2, overlap_steps=2, session_class=ShortWait)
    for _ in range(2):
        first.step(w=1.0)
    until(lambda: not under_way(first), "the round has failed")
    with pytest.raises(DeadlineExceededError):
        first.step(w=1.0)
    assert first.values()["w"] == [-2.0] * 3
    assert first.opt.local_step == 3
    # The push stays in the round, as after any wait that was given up.
    for _ in range(2):
        second.step(w=1.0)
    first.step(w=1.0)
    first.opt.wait()
    second.opt.wait()
    assert first.values() == second.values() == {"w": [-1.0] * 3, "b": [2.0] * 3}
    assert "2 local steps since its last round are lost" in caplog.text


@pytest.mark.parametrize("call", ["state_dict", "average", "finish"])
def test_what_needs_a_whole_state_ends_the_round_first(start_server: StartServer, join: Join, call: str) -> None:
    (worker,) = alone(start_server, join, interval_steps=1, overlap_steps=1)
    worker.step(w=1.0)
    getattr(worker.opt, call)()
    assert not worker.opt._training.schedule.is_under_way
    assert worker.opt.global_step == {"state_dict": 1, "average": 2, "finish": 1}[call]


def test_the_session_says_that_a_push_is_under_way(start_server: StartServer, join: Join) -> None:
    first, _ = two(start_server, join, interval_steps=1, overlap_steps=1)
    first.step(w=1.0)
    with pytest.raises(Exception, match=r"wait for its ticket's result\(\) first"):
        first.session.pull()


def test_closing_the_session_ends_the_round_under_way(start_server: StartServer, join: Join) -> None:
    first, _ = two(start_server, join, interval_steps=1, overlap_steps=1)
    first.step(w=1.0)
    Running(first.session.close).result()
    with pytest.raises(ModelAverageError, match="is closed"):
        first.opt.wait()


def test_a_stale_push_loses_its_own_steps_and_keeps_those_after_it(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(RoundPolicy(2, 1, 2, 0.0))
    first, second = (join(server, index=rank, num_worker=2, interval_steps=2, overlap_steps=2) for rank in range(2))
    start_all([first, second])
    first.step(w=1.0)
    for _ in range(2):
        second.step(w=3.0)
    second.opt.wait()
    first.step(w=1.0)  # pushes from base step 0, which is over
    first.step(w=10.0)
    first.opt.wait()
    assert first.opt.last_round is not None
    assert first.opt.last_round.outcome is Outcome.STALE
    assert first.values()["w"] == [-5.0 - 10.0] * 3
    assert "2 local steps" in caplog.text


def test_a_quorum_that_goes_on_while_this_worker_trains_takes_none_of_the_steps_since_its_push(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(RoundPolicy(2, 1, 2, 0.0))
    first = join(server, index=0, num_worker=2, interval_steps=2, overlap_steps=2, session_class=Slow)
    second = join(server, index=1, num_worker=2, interval_steps=2)
    start_all([first, second])
    assert isinstance(first.session, Slow)
    for _ in range(2):
        first.step(w=1.0)  # pushed, and the push does not get through
    first.step(w=10.0, b=1.0)
    for _ in range(6):
        second.step(w=3.0)
    first.session.go.set()
    first.opt.wait()
    assert first.opt.last_round is not None
    assert (first.opt.last_round.outcome, first.opt.global_step) == (Outcome.STALE, 3)
    assert second.values()["w"] == [1.0 - 18.0] * 3
    assert first.values() == {"w": [1.0 - 18.0 - 10.0] * 3, "b": [2.0 - 1.0] * 3}
    first.step()  # this step and the one before are in its next push
    first.opt.wait()
    assert first.opt.last_round.outcome is Outcome.COMMITTED
    assert center_of(server)["w"].tolist() == [1.0 - 18.0 - 10.0] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux's memfd")
def test_an_average_that_a_quorum_has_written_over_is_replaced_by_the_center_under_the_steps_since_the_push(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(RoundPolicy(2, 1, 2, 0.0), shared=True)
    first, second = (join(server, index=rank, num_worker=2, interval_steps=2, overlap_steps=2) for rank in range(2))
    start_all([first, second])
    for _ in range(2):
        first.step(w=1.0)
    until(lambda: not under_way(first), "the round is over")
    for _ in range(6):  # a stale push, and two rounds
        second.step(w=3.0, b=0.0)
    second.opt.wait()
    with pytest.raises(RetryPushError):
        first.session.check_intact()
    first.step(w=10.0, b=1.0)
    center = {name: list(array) for name, array in center_of(server).items()}
    assert first.opt.global_step == second.opt.global_step
    assert first.values() == {"w": [w - 10.0 for w in center["w"]], "b": [b - 1.0 for b in center["b"]]}
    first.step()  # these two steps are in its next push
    first.opt.wait()
    assert first.values() == {name: list(array) for name, array in center_of(server).items()}
    assert center_of(server)["w"].tolist() == [w - 10.0 for w in center["w"]]


def test_a_worker_that_abstained_drops_its_steps_since_and_has_none_to_average(
    start_server: StartServer, join: Join
) -> None:
    (worker,) = alone(start_server, join, interval_steps=2, overlap_steps=2, nonfinite="abstain")
    worker.step(w=1.0)
    worker.step(w=float("nan"))
    worker.step(w=1.0)
    worker.opt.wait()
    assert worker.values()["w"] == [1.0] * 3
    rounds = worker.opt.global_step
    worker.opt.finish()
    assert worker.opt.global_step == rounds


@pytest.mark.parametrize("overlap_steps", [-1, 3, 1.5, True])
def test_an_overlap_that_cannot_be_is_refused(overlap_steps: Any, start_server: StartServer, join: Join) -> None:
    server = start_server(1)
    with pytest.raises(ValueError, match="overlap_steps"):
        join(server, interval_steps=2, overlap_steps=overlap_steps)


class ShortWait(ParameterServerSession):
    """Waits for others for a short time only."""

    def begin_push(self, variables: Mapping[str, Any], weight: float = 1.0, **options: Any) -> PushTicket:
        return super().begin_push(variables, weight, **{**options, "timeout_s": 0.3})


class Slow(ParameterServerSession):
    """Pushes only when told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.go = threading.Event()

    def _prepared(self, variables: Mapping[str, ArrayLike], *others: Any) -> Any:
        push = super()._prepared(variables, *others)

        def late() -> PushResult:
            assert self.go.wait(TIMEOUT_S)
            return push()

        return late


def test_what_is_pushed_is_what_was_there_at_the_interval(start_server: StartServer, join: Join) -> None:
    server = start_server(1)
    worker = join(server, session_class=Slow, overlap_steps=1)
    worker.start()
    worker.step(w=1.0)
    worker.local.step()  # meanwhile
    assert isinstance(worker.session, Slow)
    worker.session.go.set()
    worker.opt.wait()
    assert center_of(server)["w"].tolist() == [0.0] * 3
    assert worker.values()["w"] == [-1.0] * 3


def alone(start_server: StartServer, join: Join, **options: Any) -> list[Any]:
    workers = [join(start_server(1), **options)]
    start_all(workers)
    return workers


def two(start_server: StartServer, join: Join, **options: Any) -> list[Any]:
    server = start_server(2)
    workers = [join(server, index=rank, num_worker=2, **options) for rank in range(2)]
    start_all(workers)
    return workers


def test_a_nested_push_in_the_background_gives_back_a_nested_center(start_server: StartServer) -> None:
    server = start_server(1)
    with ParameterServerSession([server.address], worker_id="a", is_chief=True) as session:
        tree = {"a": {"w": np.ones(3, np.float32)}, "b": np.zeros(2, np.float32)}
        session.initialize(tree)
        session.pull()
        ticket = session.begin_push(tree)
        tree["b"] += 5.0  # type: ignore[operator]
        center = ticket.result(TIMEOUT_S).center
    assert center["a"]["w"].tolist() == [1.0] * 3
    assert center["b"].tolist() == [0.0] * 2
