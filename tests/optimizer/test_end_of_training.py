"""The end of a training: the remaining steps are averaged, and other workers hear that this one has finished."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from numpy.typing import ArrayLike

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, Outcome, ParameterServerSession, PushResult
from modelaverage.errors import DeadlineExceededError, ModelAverageError, ServerUnavailableError
from tests.conftest import RunningServer, StartServer
from tests.optimizer.workers import (
    QUIET_S,
    TIMEOUT_S,
    Join,
    Net,
    Running,
    ShortPatience,
    Worker,
    center_of,
    outcome,
    start_all,
    together,
    wait_for_status,
)

pytestmark = pytest.mark.in_memory


class Watched(ParameterServerSession):
    """A session that records its calls in order, and reports as many training workers as the test wants."""

    still_train = 0
    refuses: ModelAverageError | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = list[str]()

    def pull(self, *args: Any, **options: Any) -> tuple[Mapping[str, Any], int]:
        self.calls.append("pull")
        return super().pull(*args, **options)

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        self.calls.append("push")
        return super().push_and_average(variables, weight, **options)

    def finish(self, timeout_s: float | None = None) -> int:
        self.calls.append("finish")
        if self.refuses is not None:
            raise self.refuses
        super().finish(timeout_s)
        return self.still_train

    def resume_training(self) -> None:
        self.calls.append("resume")
        super().resume_training()

    def close(self) -> None:
        self.calls.append("close")
        super().close()


def watched(worker: Worker) -> Watched:
    assert isinstance(worker.session, Watched)
    return worker.session


@pytest.fixture
def one(start_server: StartServer, join: Join) -> Worker:
    """The worker of a job of one, with rounds of 100 steps; it has not begun."""
    return join(start_server(1), interval_steps=100, session_class=Watched)


def train(worker: Worker, steps: int) -> None:
    for _ in range(steps):
        worker.step(w=1.0)


# The last round.


@pytest.mark.parametrize(("steps", "rounds"), [(0, 0), (1, 1), (90, 1), (100, 1), (101, 2), (250, 3)])
def test_every_step_is_in_the_center_when_the_hook_is_left(steps: int, rounds: int, one: Worker) -> None:
    with one.opt.make_session_run_hook():
        train(one, steps)
    assert one.opt.global_step == rounds
    center, _ = one.session.pull(timeout_s=TIMEOUT_S)
    assert center["w"].tolist() == one.values()["w"] == [1.0 - steps] * 3
    assert watched(one).calls == ["resume", "pull", *["push"] * rounds, "finish", "pull"]


def test_all_workers_end_with_the_same_center(start_server: StartServer, join: Join) -> None:
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, interval_steps=4) for index in range(2)]

    def run(worker: Worker, gradient: float) -> None:
        with worker.opt.make_session_run_hook():
            for _ in range(6):
                worker.step(w=gradient)

    together(lambda: run(workers[0], 1.0), lambda: run(workers[1], 3.0))
    assert workers[0].values() == workers[1].values() == {"w": [-11.0] * 3, "b": [2.0] * 3}
    assert center_of(server)["w"].tolist() == [-11.0] * 3


def test_what_was_changed_without_a_step_is_in_the_center_too(one: Worker) -> None:
    with one.opt.make_session_run_hook():
        one.give(b=5.0)
        one.local.step()
        one.opt.zero_grad()
    assert one.session.pull(timeout_s=TIMEOUT_S)[0]["b"].tolist() == [-3.0] * 3


def test_a_round_by_hand_leaves_nothing_for_a_last_one(one: Worker) -> None:
    with one.opt.make_session_run_hook():
        train(one, 3)
        one.opt.average()
    assert one.opt.global_step == 1


def test_statistics_that_an_evaluation_moved_make_no_last_round(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1), torch.nn.BatchNorm1d(2))
    with worker.opt.make_session_run_hook():
        worker.step(weight=1.0)
        worker.model(torch.ones(4, 2))
    assert worker.opt.global_step == 1


def test_without_final_round_the_last_steps_stay_local(one: Worker) -> None:
    with one.opt.make_session_run_hook(final_round=False):
        train(one, 3)
    assert watched(one).calls == ["resume", "pull", "finish"]
    assert one.values()["w"] == [-2.0] * 3


def test_after_the_init_op_there_is_nothing_to_average(one: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with one.opt.make_session_run_hook():
        train(one, 3)
        one.opt.get_init_op()()
    assert watched(one).calls == ["resume", "pull", "pull", "finish"]
    assert ["3 local steps of worker-0 since its last round: discarded" in text for text in caplog.messages] == [True]


def test_the_init_op_warns_of_nothing_when_nothing_is_lost(one: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with one.opt.make_session_run_hook():
        one.opt.get_init_op()()
        train(one, 100)
        one.opt.get_init_op()()
    assert caplog.messages == []


def test_the_members_of_the_hook_end_a_training_as_leaving_it_does(one: Worker) -> None:
    hook = one.opt.make_session_run_hook()
    hook.begin()
    hook.after_create_session()
    train(one, 3)
    hook.end()
    hook.end()
    assert watched(one).calls == ["resume", "pull", "push", "finish"]


def test_a_hook_that_never_began_ends_nothing(one: Worker) -> None:
    one.opt.make_session_run_hook().end()
    assert watched(one).calls == []


# By an exception.


@pytest.mark.parametrize(
    "error", [ValueError(), KeyboardInterrupt(), SystemExit(1), SystemExit("why"), GeneratorExit()], ids=repr
)
def test_after_an_exception_there_is_no_last_round_and_nobody_has_finished(error: BaseException, one: Worker) -> None:
    hook = one.opt.make_session_run_hook()

    def run() -> None:
        with hook:
            train(one, 3)
            raise error

    with pytest.raises(type(error)):
        run()
    hook.end()  # as some loops do in any case
    assert watched(one).calls == ["resume", "pull"]
    assert one.values()["w"] == [-2.0] * 3


@pytest.mark.parametrize("code", [None, 0])
def test_an_exit_without_an_error_is_a_normal_end(code: int | None, one: Worker) -> None:

    def run() -> None:
        with one.opt.make_session_run_hook():
            train(one, 3)
            sys.exit(code)

    with pytest.raises(SystemExit):
        run()
    assert watched(one).calls == ["resume", "pull", "push", "finish"]


def test_a_last_round_that_fails_is_an_error_and_the_worker_has_not_finished(
    start_server: StartServer, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = join(start_server(2), num_worker=2, interval_steps=100, session_class=ShortPatience)
    finished = list[bool]()
    monkeypatch.setattr(worker.session, "finish", lambda: finished.append(True))
    assert isinstance(worker.session, ShortPatience)
    worker.session.patience_s = QUIET_S
    with pytest.raises(DeadlineExceededError, match="the round did not commit"), worker.opt.make_session_run_hook():
        train(worker, 3)
    assert finished == []
    assert worker.values()["w"] == [-2.0] * 3


def test_servers_that_cannot_be_told_are_an_error(one: Worker) -> None:
    watched(one).refuses = ServerUnavailableError("the parameter server is gone")
    with pytest.raises(ServerUnavailableError), one.opt.make_session_run_hook():
        train(one, 3)
    assert one.opt.global_step == 1


# Log messages.


@pytest.mark.parametrize(("still_train", "said"), [(1, "1 worker;"), (3, "3 workers;"), (0, None)])
def test_a_worker_that_finishes_before_others_says_so(
    still_train: int, said: str | None, one: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ma_client")
    watched(one).still_train = still_train
    with one.opt.make_session_run_hook():
        train(one, 100)
    expected = [] if said is None else [f"worker-0 has finished at global_step 1; rounds go on with {said}"]
    assert [text[: len(line)] for text, line in zip(caplog.messages, expected, strict=True)] == expected


@pytest.mark.parametrize("at_the_end", [False, True], ids=["in a step", "at the end"])
def test_a_push_that_came_too_late_says_how_many_steps_are_lost(
    at_the_end: bool, one: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with one.opt.make_session_run_hook():
        train(one, 99)
        overtaken(one)
        if at_the_end:
            assert not any("local steps" in text for text in caplog.messages)
        else:
            train(one, 1)
    steps = 99 if at_the_end else 100
    assert outcome(one) is Outcome.STALE
    said = [text for text in caplog.messages if "local steps" in text]
    assert [f"{steps} local steps since its last round are lost" in text for text in said] == [True]
    assert one.values() == {"w": [1.0] * 3, "b": [2.0] * 3}


def overtaken(worker: Worker) -> None:
    """A round commits without this worker: another process under its worker id makes it."""
    address = worker.session.ps_hosts[0]
    with ParameterServerSession([address], worker_id=worker.session.worker_id) as other:
        center, _ = other.pull(timeout_s=TIMEOUT_S)
        other.push_and_average(center, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("waits", [False, True], ids=["the round is over", "the round waits"])
def test_steps_that_a_push_had_that_failed_here_and_was_counted_are_not_lost(
    waits: bool, more: int, start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(2)
    first, second = (
        join(server, index=index, num_worker=2, interval_steps=100, session_class=ShortPatience) for index in range(2)
    )
    start_all([first, second])
    train(first, 3)
    train(second, 3)
    assert isinstance(first.session, ShortPatience)
    first.session.patience_s = QUIET_S
    with pytest.raises(DeadlineExceededError):
        first.opt.average()
    first.session.patience_s = None
    for _ in range(more):
        first.step(w=1.0, b=1.0)  # the push that counts left b alone
    if waits:
        wait_for_status(server, lambda status: status.connected_workers == 0)  # the push that failed here has ended
        again = Running(first.opt.average)
        wait_for_status(server, lambda status: status.connected_workers == 1)
        second.opt.average()
        again.result()
    else:
        second.opt.average()
        first.opt.average()
    assert outcome(first) is (Outcome.ALREADY_COUNTED if waits else Outcome.STALE)
    assert first.values() == second.values() == {"w": [-2.0] * 3, "b": [2.0] * 3}
    said = [f"{more} local steps since its last round are lost" in text for text in caplog.messages]
    assert said == ([True] if more else [])


def test_steps_since_the_last_round_are_part_of_a_checkpoint(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(1)
    stopped, again = (join(server, interval_steps=100) for _ in range(2))
    stopped.start()
    train(stopped, 3)
    saved = {"model": stopped.model.state_dict(), "optimizer": stopped.opt.state_dict()}
    stopped.session.close()
    with again.opt.make_session_run_hook():
        again.model.load_state_dict(saved["model"])
        again.opt.load_state_dict(saved["optimizer"])
    assert again.opt.global_step == 1
    assert center_of(server)["w"].tolist() == [-2.0] * 3
    assert not any("local steps" in text for text in caplog.messages)


def test_a_restored_worker_whose_steps_the_center_replaces_says_so(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    stopped, fresh = join(start_server(1), interval_steps=100), start_server(1)
    stopped.start()
    train(stopped, 3)
    saved = {"model": stopped.model.state_dict(), "optimizer": stopped.opt.state_dict()}
    for warned in (False, True):  # the chief's own values become the center once
        again = join(fresh, interval_steps=100)
        again.model.load_state_dict(saved["model"])
        again.opt.load_state_dict(saved["optimizer"])
        again.start()
        again.session.close()
        assert ("3 local steps" in caplog.text) is warned


def test_a_state_dict_of_before_there_were_last_rounds_is_read(one: Worker) -> None:
    one.start()
    old = one.opt.state_dict()
    del old["model_average"]["steps_since_round"]
    old["model_average"]["local_step"] = 103
    one.opt.load_state_dict(old)
    one.opt.finish()
    assert one.opt.global_step == 1


# A second training.


def test_a_hook_can_be_entered_again(one: Worker) -> None:
    hook = one.opt.make_session_run_hook()
    for _ in range(2):
        with hook:
            train(one, 3)
    assert watched(one).calls == [*["resume", "pull", "push", "finish"] * 2]
    assert (one.opt.local_step, one.opt.global_step, one.values()["w"]) == (6, 2, [-5.0] * 3)


@pytest.fixture
def own_session(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Worker]:
    """A worker that gets its cluster from the environment, and whose optimizer makes the session."""
    server: RunningServer = start_server(1)

    def make() -> Worker:
        for name, value in {"PS_HOSTS": server.address, "NUM_WORKERS": "1", "TASK_INDEX": "0"}.items():
            monkeypatch.setenv(f"MA_{name}", value)
        getter = ModelAverageCustomGetter("cpu")
        model = getter(Net())
        local = torch.optim.SGD(model.parameters(), lr=1.0)
        opt = ModelAverageOptimizer(local, None, None, getter, interval_steps=100)
        return Worker(opt.session, model, local, opt)

    return make


@pytest.mark.parametrize("by_an_exception", [False, True])
def test_a_session_of_the_optimizers_own_is_closed_and_opened_again(
    by_an_exception: bool, own_session: Callable[[], Worker]
) -> None:
    worker = own_session()
    hook = worker.opt.make_session_run_hook()
    with suppress(KeyError), hook:
        train(worker, 3)
        if by_an_exception:
            raise KeyError
    with pytest.raises(ModelAverageError, match="closed"):
        worker.opt.session.pull(timeout_s=TIMEOUT_S)
    with hook:
        assert worker.opt.global_step == (0 if by_an_exception else 1)
        train(worker, 3)
    rounds = 1 if by_an_exception else 2
    assert (worker.opt.global_step, worker.values()["w"]) == (rounds, [1.0 - 3 * rounds] * 3)
    assert worker.opt.session is not worker.session
