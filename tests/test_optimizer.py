"""Every member of the optimizer, against a real server with one real session per worker."""

from __future__ import annotations

import copy
import inspect
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray

from ma_client import (
    ClusterError,
    ModelAverageCustomGetter,
    ModelAverageOptimizer,
    Outcome,
    ParameterServerSession,
    PushResult,
)
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    ModelAverageError,
    NotInitializedError,
    ServerUnavailableError,
)
from tests.conftest import RunningServer, StartServer

# For what can only go wrong: nothing waits this long in a test that passes.
TIMEOUT_S = 20.0
# For what must not happen: a test that passes always waits this long.
QUIET_S = 0.2
T = TypeVar("T")


class Net(torch.nn.Module):
    """Two variables of three elements each."""

    def __init__(self, w: float = 1.0, b: float = 2.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((3,), w))
        self.b = torch.nn.Parameter(torch.full((3,), b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x + self.b


def sgd(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """With rate 1 a step subtracts the gradient: whole numbers stay exact."""
    return torch.optim.SGD(parameters, lr=1.0)


def momentum(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


@dataclass
class Worker:
    """One worker of a job."""

    session: ParameterServerSession
    model: torch.nn.Module
    local: torch.optim.Optimizer
    opt: ModelAverageOptimizer

    def start(self) -> None:
        hook = self.opt.make_session_run_hook()
        hook.begin()
        Running(hook.after_create_session).result()  # which waits for the chief: not for ever, in a test

    def give(self, **gradients: float) -> None:
        """These gradients, in every element; None for the other parameters."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = torch.full_like(parameter, gradients[name]) if name in gradients else None

    def step(self, **gradients: float) -> None:
        self.give(**gradients)
        self.opt.step()

    def values(self) -> dict[str, list[Any]]:
        return {name: parameter.tolist() for name, parameter in self.model.named_parameters()}


Join = Callable[..., Worker]


@pytest.fixture
def join() -> Iterator[Join]:
    """join(server, model, index=..., num_worker=..., ...) -> a worker that is in the job but has not started."""
    with ExitStack() as sessions:

        def join_job(
            server: RunningServer,
            model: torch.nn.Module | None = None,
            *,
            index: int = 0,
            num_worker: int = 1,
            local: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer] = sgd,
            session_class: type[ParameterServerSession] = ParameterServerSession,
            average_buffers: bool = True,
            worker_device: str = "cpu",
            **options: Any,
        ) -> Worker:
            session = session_class([server.address], worker_id=f"worker-{index}", is_chief=index == 0)
            sessions.enter_context(session)
            getter = ModelAverageCustomGetter(worker_device, average_buffers)
            averaged = getter(Net() if model is None else model)
            inner = local(averaged.parameters())
            settings = {"interval_steps": 1, **options}
            opt = ModelAverageOptimizer(inner, num_worker, index == 0, getter, session=session, **settings)
            return Worker(session, averaged, inner, opt)

        yield join_job


@pytest.fixture
def alone(start_server: StartServer, join: Join) -> Join:
    """alone(model, ...) -> the started worker of a job of one."""

    def start_alone(model: torch.nn.Module | None = None, **options: Any) -> Worker:
        worker = join(start_server(num_workers=1), model, **options)
        worker.start()
        return worker

    return start_alone


class Running(Generic[T]):
    """A call on a thread of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def finishes_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        assert self.finishes_within(TIMEOUT_S), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._result


def together(*calls: Callable[[], T]) -> list[T]:
    """All calls at once, each on a thread of its own; what they return."""
    return [running.result() for running in [Running(call) for call in calls]]


def start_all(workers: Sequence[Worker]) -> None:
    together(*(worker.start for worker in workers))


def outcome(worker: Worker) -> Outcome:
    assert worker.opt.last_round is not None
    return worker.opt.last_round.outcome


def center_of(server: RunningServer) -> Mapping[str, NDArray[np.generic]]:
    with ParameterServerSession([server.address], worker_id="reader") as reader:
        return reader.pull(timeout_s=TIMEOUT_S)[0]


def wait_for_status(server: RunningServer, condition: Callable[[Any], bool]) -> None:
    """Asks the server until its status fulfils the condition."""
    with ParameterServerSession([server.address], worker_id="reader") as reader:
        deadline = threading.Event()
        timer = threading.Timer(TIMEOUT_S, deadline.set)
        timer.start()
        try:
            while not condition(reader.status()):
                assert not deadline.is_set(), "the server never came into this state"
        finally:
            timer.cancel()


class ShortPatience(ParameterServerSession):
    """Gives up at the barrier while ``patience_s`` is set."""

    patience_s: float | None = None

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        return super().push_and_average(variables, weight, **{"timeout_s": self.patience_s, **options})


class Announced(ParameterServerSession):
    """Says when a push begins and when its answer is there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.push_begins, self.push_is_over = threading.Event(), threading.Event()

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        self.push_begins.set()
        result = super().push_and_average(variables, weight, **options)
        self.push_is_over.set()
        return result


# The constructor.


def test_the_constructor_has_the_originals_parameters_and_keyword_only_session() -> None:
    parameters = inspect.signature(ModelAverageOptimizer).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "opt": inspect.Parameter.empty,
        "num_worker": inspect.Parameter.empty,
        "is_chief": inspect.Parameter.empty,
        "ma_custom_getter": inspect.Parameter.empty,
        "interval_steps": 100,
        "use_locking": True,
        "name": "ModelAverageOptimizer",
        "session": None,
    }
    assert list(parameters) == [
        *("opt", "num_worker", "is_chief", "ma_custom_getter", "interval_steps", "use_locking", "name", "session")
    ]
    kinds = [parameter.kind for parameter in parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 7 + [inspect.Parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("settings", [{"interval_steps": 0}, {"interval_steps": -1}, {"num_worker": 0}])
def test_numbers_below_one_are_refused(settings: dict[str, int], start_server: StartServer, join: Join) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} {value} is not a whole number from 1 on"):
        join(start_server(num_workers=1), **settings)


def test_a_parameter_that_is_not_in_the_getters_model_is_refused(start_server: StartServer, join: Join) -> None:
    foreign = torch.nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shape \[2, 5\] that is not in the model given to ma_custom_getter"):
        join(start_server(num_workers=1), local=lambda own: torch.optim.SGD([*own, foreign], lr=1.0))


def test_is_chief_that_contradicts_the_session_is_refused(alone: Join) -> None:
    worker = alone()
    getter = ModelAverageCustomGetter("cpu")
    local = torch.optim.SGD(getter(Net()).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="is_chief is False, but the session was made with is_chief=True"):
        ModelAverageOptimizer(local, 1, False, getter, session=worker.session)


def test_num_worker_other_than_the_servers_is_refused_with_both_numbers(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=2), num_worker=3)
    with pytest.raises(ValueError, match="num_worker is 3, but the server was started with --num-workers 2"):
        worker.start()


def test_without_a_session_the_environment_says_who_is_who(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MA_PS_HOSTS", start_server(num_workers=1).address)
    monkeypatch.setenv("MA_NUM_WORKERS", "1")
    monkeypatch.setenv("MA_TASK_INDEX", "0")
    getter = ModelAverageCustomGetter("cpu")
    model = getter(Net())
    opt = ModelAverageOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), None, None, getter, interval_steps=1)
    with opt.make_session_run_hook():
        model(torch.ones(3)).sum().backward()
        opt.step()
        assert opt.global_step == 1
        assert opt.session.worker_id == "worker-0"
    with pytest.raises(ModelAverageError, match="is closed"):  # the hook closes the session that the optimizer made
        opt.session.pull(timeout_s=TIMEOUT_S)


def test_without_session_and_environment_the_missing_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MA_PS_HOSTS", "MA_NUM_WORKERS", "MA_TASK_INDEX"):
        monkeypatch.delenv(name, raising=False)
    getter = ModelAverageCustomGetter("cpu")
    local = torch.optim.SGD(getter(Net()).parameters(), lr=1.0)
    for num_worker, is_chief in ((None, True), (1, None), (1, True)):
        with pytest.raises(ClusterError, match="MA_PS_HOSTS, MA_NUM_WORKERS, MA_TASK_INDEX not set"):
            ModelAverageOptimizer(local, num_worker, is_chief, getter)


def test_a_session_that_was_given_is_left_open(alone: Join) -> None:
    worker = alone()
    with worker.opt.make_session_run_hook():
        pass
    assert worker.session.pull(timeout_s=TIMEOUT_S)[1] == 0


# What torch expects of an optimizer.


def test_it_is_a_torch_optimizer_that_shares_all_state_with_the_local_one(alone: Join) -> None:
    worker = alone(local=momentum)
    assert isinstance(worker.opt, torch.optim.Optimizer)
    worker.step(w=1.0)
    worker.opt.load_state_dict(worker.opt.state_dict())  # torch replaces state and groups here
    for name in ("param_groups", "state", "defaults"):
        assert getattr(worker.opt, name) is getattr(worker.local, name)
    worker.opt.param_groups[0]["lr"] = 0.0
    before = worker.values()
    worker.step(w=1.0)
    assert worker.values() == before


def test_a_learning_rate_scheduler_sets_the_rate_of_the_local_optimizer(alone: Join) -> None:
    worker = alone(interval_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(worker.opt, step_size=1, gamma=0.5)
    for expected in (0.0, -0.5, -0.75):
        worker.step(w=1.0)
        scheduler.step()  # warns, which is an error here, unless it sees that the step came first
        assert worker.values()["w"] == [expected] * 3
    assert worker.local.param_groups[0]["lr"] == 0.125


def test_one_cycle_sees_the_momentum_and_steps_by_apply_gradients(alone: Join) -> None:
    worker = alone(local=momentum)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(worker.opt, max_lr=1.0, total_steps=4)
    rates = set()
    for _ in range(3):
        worker.opt.apply_gradients([(torch.ones(3), worker.model.get_parameter("w"))], global_step=0)
        scheduler.step()
        rates.add((worker.local.param_groups[0]["lr"], worker.local.param_groups[0]["momentum"]))
    assert len(rates) == 3


def test_a_step_that_the_grad_scaler_skips_does_not_count(alone: Join) -> None:
    worker = alone()
    scaler = torch.amp.GradScaler("cpu")
    for factor, local_step in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        worker.opt.zero_grad()
        scaler.scale(worker.model(torch.ones(3)).sum() * factor).backward()
        scaler.unscale_(worker.opt)
        scaler.step(worker.opt)
        scaler.update()
        assert (worker.opt.local_step, worker.opt.global_step) == (local_step, local_step)
    assert worker.values() == {"w": [-1.0] * 3, "b": [0.0] * 3}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_does_what_torch_does(set_to_none: bool, alone: Join) -> None:
    worker = alone()
    worker.give(w=1.0)
    worker.opt.zero_grad(set_to_none)
    w, b = worker.model.get_parameter("w").grad, worker.model.get_parameter("b").grad
    assert (w is None) if set_to_none else (w is not None and w.tolist() == [0.0] * 3)
    assert b is None


def test_step_hooks_run_once_for_each_step(alone: Join) -> None:
    worker = alone()
    seen = list[tuple[str, int]]()
    worker.opt.register_step_pre_hook(lambda *_: seen.append(("before", worker.opt.local_step)))
    worker.opt.register_step_post_hook(lambda *_: seen.append(("after", worker.opt.global_step)))
    worker.step(w=1.0)
    worker.opt.apply_gradients([(torch.ones(3), worker.model.get_parameter("w"))], global_step=0)
    assert seen == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]


def test_a_parameter_group_can_be_added_before_the_center_exists(start_server: StartServer, join: Join) -> None:
    worker = join(
        start_server(num_workers=1), local=lambda own: torch.optim.SGD([{"params": [next(own)], "lr": 1.0}], lr=0.0)
    )
    worker.opt.add_param_group({"params": [worker.model.get_parameter("b")], "lr": 2.0})
    worker.start()
    worker.step(w=1.0, b=1.0)
    assert worker.values() == {"w": [0.0] * 3, "b": [0.0] * 3}
    assert [group["lr"] for group in worker.local.param_groups] == [1.0, 2.0]


def test_a_parameter_that_joined_the_model_late_can_be_added(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=1))
    late = torch.nn.Parameter(torch.ones(3))
    worker.model.register_parameter("late", late)
    worker.opt.add_param_group({"params": [late]})
    worker.start()
    worker.step(late=1.0)
    assert worker.session.pull(timeout_s=TIMEOUT_S)[0]["late"].tolist() == [0.0] * 3


def test_a_parameter_group_is_refused_once_the_center_exists(alone: Join) -> None:
    worker = alone(local=lambda own: torch.optim.SGD([next(own)], lr=1.0))
    with pytest.raises(ValueError, match="the center exists already"):
        worker.opt.add_param_group({"params": [worker.model.get_parameter("b")]})
    assert len(worker.opt.param_groups) == 1


def test_a_refused_parameter_group_changes_nothing(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=1))
    with pytest.raises(ValueError, match="not in the model given to ma_custom_getter"):
        worker.opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(worker.opt.param_groups) == 1


def test_a_parameter_that_is_unfrozen_after_the_start_is_named(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=1), interval_steps=1)
    name, parameter = next(iter(worker.model.named_parameters()))
    parameter.requires_grad_(False)
    worker.start()
    parameter.requires_grad_(True)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=f"'{name}' is trained, but was frozen"):
        worker.opt.step()


def restart(worker: Worker, again: Worker) -> None:
    """Saves a worker to a file and goes on from it in another one, as after a restart of its process."""
    file = io.BytesIO()
    torch.save({"model": worker.model.state_dict(), "optimizer": worker.opt.state_dict()}, file)
    worker.session.close()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.start()
    again.model.load_state_dict(saved["model"])
    again.opt.load_state_dict(saved["optimizer"])


def test_a_state_dict_that_went_through_a_file_continues_as_if_nothing_had_happened(
    start_server: StartServer, join: Join, alone: Join
) -> None:
    server = start_server(num_workers=1)
    stopped, again = (join(server, local=momentum, interval_steps=2) for _ in range(2))
    uninterrupted = alone(local=momentum, interval_steps=2)
    stopped.start()
    for worker in (stopped, uninterrupted):
        for _ in range(3):
            worker.step(w=1.0, b=2.0)
    restart(stopped, again)
    assert (again.opt.local_step, again.opt.global_step) == (3, 1)
    for worker in (again, uninterrupted):
        worker.step(w=1.0, b=2.0)
    assert again.values() == uninterrupted.values()
    assert (again.opt.local_step, again.opt.global_step) == (4, 2)


def test_a_restart_within_an_interval_loses_no_update(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=1)
    stopped, again = (join(server, interval_steps=2) for _ in range(2))
    stopped.start()
    stopped.step(w=1.0)
    restart(stopped, again)
    again.step(b=1.0)
    assert again.opt.global_step == 1
    assert center_of(server)["w"].tolist() == [0.0] * 3


def test_a_restored_chief_gives_a_fresh_server_its_base_step(start_server: StartServer, join: Join) -> None:
    stopped, again = (join(start_server(num_workers=1)) for _ in range(2))
    stopped.start()
    stopped.step(w=1.0)
    again.opt.load_state_dict(stopped.opt.state_dict())
    again.start()
    assert again.opt.global_step == 1


def test_a_state_dict_from_before_the_start_leaves_the_base_step_alone(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=1))
    fresh = copy.deepcopy(worker.opt.state_dict())
    worker.start()
    worker.opt.load_state_dict(fresh)
    worker.step(w=1.0)
    assert worker.opt.global_step == 1


def test_a_plain_state_dict_of_the_local_optimizer_leaves_local_step_alone(alone: Join) -> None:
    worker = alone(local=momentum)
    worker.step(w=1.0)
    plain = torch.optim.SGD(Net().parameters(), lr=0.25, momentum=0.5).state_dict()
    worker.opt.load_state_dict(plain)
    assert worker.local.param_groups[0]["lr"] == 0.25
    assert worker.opt.get_slot(worker.model.get_parameter("w"), "momentum_buffer") is None
    assert (worker.opt.local_step, worker.opt.global_step) == (1, 1)


def test_after_an_old_base_step_is_restored_the_worker_goes_on_from_the_center(alone: Join) -> None:
    worker = alone()
    old = copy.deepcopy(worker.opt.state_dict())
    worker.step(w=1.0, b=1.0)
    worker.opt.load_state_dict(old)
    worker.step(w=100.0, b=100.0)
    assert outcome(worker) is Outcome.STALE
    assert worker.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    worker.step(w=1.0, b=1.0)
    assert outcome(worker) is Outcome.COMMITTED
    assert worker.values() == {"w": [-1.0] * 3, "b": [0.0] * 3}
    assert worker.opt.global_step == 2


def test_a_closure_is_run_and_its_value_returned(alone: Join) -> None:
    worker = alone()

    def closure() -> float:
        worker.give(w=1.0)
        return 42.0

    assert worker.opt.step(closure) == 42.0
    assert worker.opt.step() is None
    assert worker.values()["w"] == [-1.0] * 3


def test_lbfgs_works_as_the_local_optimizer(alone: Join) -> None:
    worker = alone(local=lambda own: torch.optim.LBFGS(own, lr=0.5))

    def closure() -> float:
        worker.opt.zero_grad()
        loss: torch.Tensor = (worker.model(torch.arange(3.0)) - 7.0).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    first = worker.opt.step(closure)
    assert worker.opt.step(closure) < 1e-3 * first
    assert (worker.opt.local_step, worker.opt.global_step) == (2, 2)


def test_it_meets_the_barrier_when_the_interval_divides_local_step_and_only_then(alone: Join) -> None:
    worker = alone(interval_steps=3)
    reached = list[tuple[int, int]]()
    for _ in range(7):
        worker.step(w=1.0)
        reached.append((worker.opt.local_step, worker.session.pull(timeout_s=TIMEOUT_S)[1]))
    assert reached == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2)]


def test_the_average_of_two_workers_is_installed_in_both(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2, interval_steps=2) for index in range(2)]
    start_all(workers)
    first, second = workers
    first.step(w=1.0)
    second.step(w=3.0)
    assert (first.values()["w"], second.values()["w"]) == ([0.0] * 3, [-2.0] * 3)
    together(lambda: first.step(w=1.0), lambda: second.step(w=3.0))
    assert first.values() == second.values() == {"w": [-3.0] * 3, "b": [2.0] * 3}
    for worker in workers:
        assert worker.opt.last_round is not None
        assert worker.opt.last_round.contributors == ("worker-0", "worker-1")


def test_a_step_at_the_interval_without_a_center_says_what_to_do(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(num_workers=1))
    with pytest.raises(NotInitializedError, match="pull the center"):
        worker.step(w=1.0)


# compute_gradients.


def test_gradients_of_a_tensor_and_of_a_callable_are_those_of_autograd(alone: Join) -> None:
    worker = alone()
    x = torch.arange(3.0)

    def loss() -> torch.Tensor:
        value: torch.Tensor = worker.model(x).square().sum()
        return value

    expected = torch.autograd.grad(loss(), list(worker.model.parameters()))
    with torch.no_grad():
        by_callable = worker.opt.compute_gradients(loss)
    for pairs in (worker.opt.compute_gradients(loss()), by_callable):
        assert [id(variable) for _, variable in pairs] == [id(parameter) for parameter in worker.model.parameters()]
        for (gradient, _), value in zip(pairs, expected, strict=True):
            assert gradient is not None
            assert torch.equal(gradient, value)


def test_var_list_chooses_the_variables_and_their_order(alone: Join) -> None:
    worker = alone()
    b, w = worker.model.get_parameter("b"), worker.model.get_parameter("w")
    x = torch.arange(3.0)
    assert [v is b for _, v in worker.opt.compute_gradients(worker.model(x).sum(), [b])] == [True]
    (of_b, _), (of_w, _) = worker.opt.compute_gradients(worker.model(x).sum(), var_list=[b, w])
    assert of_b is not None
    assert of_w is not None
    assert (of_b.tolist(), of_w.tolist()) == ([1.0] * 3, x.tolist())


def test_a_loss_that_is_no_scalar_is_summed_or_weighted_by_grad_loss(alone: Join) -> None:
    worker = alone()
    x, weights = torch.ones(3), torch.tensor([1.0, 10.0, 100.0])
    (summed, _), _ = worker.opt.compute_gradients(worker.model(x))
    (weighted, _), _ = worker.opt.compute_gradients(worker.model(x), grad_loss=weights)
    assert summed is not None
    assert weighted is not None
    assert (summed.tolist(), weighted.tolist()) == ([1.0] * 3, weights.tolist())


def test_the_gradient_is_none_where_the_loss_does_not_depend_on_the_variable(alone: Join) -> None:
    worker = alone()
    w = worker.model.get_parameter("w")
    assert [gradient is None for gradient, _ in worker.opt.compute_gradients(w.sum())] == [False, True]
    assert [gradient for gradient, _ in worker.opt.compute_gradients(torch.tensor(1.0))] == [None, None]


def test_the_gradient_of_a_frozen_parameter_is_none(alone: Join) -> None:
    model = Net()
    model.b.requires_grad_(False)
    worker = alone(model)
    gradients = [gradient for gradient, _ in worker.opt.compute_gradients(lambda: worker.model(torch.ones(3)).sum())]
    assert gradients[0] is not None
    assert gradients[1:] == [None]


def test_compute_gradients_touches_no_grad(alone: Join) -> None:
    worker = alone()
    worker.give(w=5.0)
    before = worker.model.get_parameter("w").grad
    worker.opt.compute_gradients(worker.model(torch.ones(3)).sum())
    assert worker.model.get_parameter("w").grad is before
    assert before is not None
    assert before.tolist() == [5.0] * 3
    assert worker.model.get_parameter("b").grad is None


def test_gates_are_the_originals_numbers_and_others_are_refused(alone: Join) -> None:
    gates = ModelAverageOptimizer.GATE_NONE, ModelAverageOptimizer.GATE_OP, ModelAverageOptimizer.GATE_GRAPH
    assert gates == (0, 1, 2)
    worker = alone()
    for gate in gates:
        worker.opt.minimize(worker.model(torch.ones(3)).sum(), 0, gate_gradients=gate)
    with pytest.raises(ValueError, match="gate_gradients 3 is none of GATE_NONE, GATE_OP, GATE_GRAPH"):
        worker.opt.compute_gradients(worker.model(torch.ones(3)).sum(), gate_gradients=3)


# apply_gradients and minimize.


def test_apply_gradients_and_minimize_have_the_effect_of_step(alone: Join) -> None:
    by_step, by_apply, by_minimize = (alone(local=momentum, interval_steps=2) for _ in range(3))

    def loss_of(worker: Worker) -> torch.Tensor:
        loss: torch.Tensor = worker.model(torch.arange(3.0)).square().sum()
        return loss

    for _ in range(5):
        by_step.opt.zero_grad()
        loss_of(by_step).backward()  # type: ignore[no-untyped-call]
        by_step.opt.step()
        by_apply.opt.apply_gradients(iter(by_apply.opt.compute_gradients(loss_of(by_apply))), global_step=0)
        by_minimize.opt.minimize(lambda: loss_of(by_minimize), global_step=0)
        assert by_step.values() == by_apply.values() == by_minimize.values()
    assert by_step.opt.local_step == by_apply.opt.local_step == by_minimize.opt.local_step == 5
    assert by_step.opt.global_step == by_apply.opt.global_step == by_minimize.opt.global_step == 2


def test_apply_gradients_uses_these_gradients_alone_and_restores_every_grad(alone: Join) -> None:
    worker = alone()
    worker.give(w=5.0, b=5.0)
    before = [parameter.grad for parameter in worker.model.parameters()]
    worker.opt.apply_gradients([(torch.ones(3), worker.model.get_parameter("w"))], global_step=0)
    assert worker.values() == {"w": [0.0] * 3, "b": [2.0] * 3}
    assert [id(parameter.grad) for parameter in worker.model.parameters()] == [id(gradient) for gradient in before]


def test_apply_gradients_restores_every_grad_when_it_fails(alone: Join) -> None:
    worker = alone()
    worker.give(w=5.0)
    with pytest.raises(RuntimeError, match="size"):
        worker.opt.apply_gradients([(torch.ones(4), worker.model.get_parameter("w"))], global_step=0)
    gradient = worker.model.get_parameter("w").grad
    assert gradient is not None
    assert gradient.tolist() == [5.0] * 3
    assert (worker.opt.local_step, worker.values()["w"]) == (0, [1.0] * 3)


def test_apply_gradients_refuses_what_the_original_refuses_and_changes_nothing(alone: Join) -> None:
    worker = alone()
    w = worker.model.get_parameter("w")
    with pytest.raises(ValueError, match="Must supply at least one variable"):
        worker.opt.apply_gradients([], global_step=0)
    with pytest.raises(ValueError, match="Global step is required"):
        worker.opt.apply_gradients([(torch.ones(3), w)])
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        worker.opt.apply_gradients([(None, w)], global_step=0)
    with pytest.raises(ValueError, match=r"shape \[7\] is not a parameter of this optimizer"):
        worker.opt.apply_gradients([(torch.ones(7), torch.ones(7))], global_step=0)
    with pytest.raises(ValueError, match="Global step is required"):
        worker.opt.minimize(lambda: worker.model(torch.ones(3)).sum())
    assert (worker.opt.local_step, worker.opt.global_step) == (0, 0)
    assert worker.values() == {"w": [1.0] * 3, "b": [2.0] * 3}


def test_minimize_refuses_what_is_not_a_parameter(alone: Join) -> None:
    worker = alone()
    for stranger in (torch.zeros(7, requires_grad=True), "w"):
        with pytest.raises(ValueError, match="is not a parameter of this optimizer"):
            worker.opt.minimize(worker.model(torch.ones(3)).sum(), 0, var_list=[stranger])  # type: ignore[list-item]
    assert worker.opt.local_step == 0


def test_a_global_step_tensor_counts_the_rounds(alone: Join) -> None:
    worker = alone(interval_steps=2)
    global_step = torch.tensor(0)
    counted = list[int]()
    for _ in range(5):
        worker.opt.minimize(lambda: worker.model(torch.ones(3)).sum(), global_step)
        counted.append(int(global_step))
    assert counted == [0, 1, 1, 2, 2]


# Start of training: hook and init op.


def test_the_chief_initializes_and_the_others_wait_for_it_and_pull(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=3)
    chief, *others = (join(server, Net(w=float(index)), index=index, num_worker=3) for index in range(3))
    waiting = [Running(other.start) for other in others]
    wait_for_status(server, lambda status: {w.worker_id for w in status.workers} >= {"worker-1", "worker-2"})
    assert not any(start.finishes_within(QUIET_S / 2) for start in waiting)
    chief.start()
    for start in waiting:
        start.result()
    for worker in (chief, *others):
        assert worker.values() == {"w": [0.0] * 3, "b": [2.0] * 3}
        assert (worker.opt.local_step, worker.opt.global_step) == (0, 0)


def test_a_chief_that_starts_again_pulls_the_center_that_is_there(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=1)
    first = join(server)
    first.start()
    first.step(w=1.0, b=1.0)
    first.session.close()
    again = join(server, Net(w=7.0, b=7.0))
    again.start()
    assert again.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    assert again.opt.global_step == 1


def test_the_init_op_makes_the_local_variables_equal_to_the_center(alone: Join) -> None:
    worker = alone(Net(w=1.0), interval_steps=100)
    worker.step(w=5.0, b=5.0)
    assert worker.values() == {"w": [-4.0] * 3, "b": [-3.0] * 3}
    worker.opt.get_init_op()()
    assert worker.values() == {"w": [1.0] * 3, "b": [2.0] * 3}


def test_the_hook_has_the_originals_members_and_is_a_context_manager(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=1)
    worker = join(server)
    hook = worker.opt.make_session_run_hook()
    hook.begin()
    hook.after_create_session(session=None, coord=None)
    hook.before_run(run_context=None)
    worker.step(w=1.0)
    hook.after_run(run_context=None, run_values=None)
    hook.end(session=None)
    again = join(server)
    with again.opt.make_session_run_hook() as entered:
        assert type(entered) is type(hook)
        assert again.values() == {"w": [0.0] * 3, "b": [2.0] * 3}


# The local optimizer's state.


def test_slots_are_the_local_optimizers_state(alone: Join) -> None:
    worker = alone(local=lambda own: torch.optim.Adam(own, lr=0.1), name="averaged")
    w, b = worker.model.get_parameter("w"), worker.model.get_parameter("b")
    assert (worker.opt.get_name(), worker.opt.get_slot_names(), worker.opt.variables()) == ("averaged", [], [])
    worker.step(w=1.0)
    assert worker.opt.get_slot_names() == ["exp_avg", "exp_avg_sq", "step"]
    assert worker.opt.get_slot(w, "exp_avg") is worker.local.state[w]["exp_avg"]
    assert worker.opt.get_slot(w, "no such slot") is None
    assert worker.opt.get_slot(b, "exp_avg") is None
    assert b not in worker.local.state  # asking makes no state
    assert {id(v) for v in worker.opt.variables()} == {id(v) for v in worker.local.state[w].values()}


def test_the_name_is_the_originals_unless_given(alone: Join) -> None:
    assert alone().opt.get_name() == "ModelAverageOptimizer"


def test_local_optimizer_state_stays_local_and_is_kept_across_rounds(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2, local=momentum) for index in range(2)]
    start_all(workers)
    first, second = workers
    for _ in range(3):
        together(lambda: first.step(w=1.0, b=1.0), lambda: second.step(w=4.0, b=4.0))
    assert first.values() == second.values()
    for worker, gradient in ((first, 1.0), (second, 4.0)):
        buffer = worker.opt.get_slot(worker.model.get_parameter("w"), "momentum_buffer")
        assert buffer.tolist() == [1.75 * gradient] * 3


# Locking.


def test_the_local_update_waits_for_who_holds_the_lock(alone: Join) -> None:
    worker = alone(interval_steps=100)
    worker.give(w=1.0)
    with worker.opt.lock:
        step = Running(worker.opt.step)
        assert not step.finishes_within(QUIET_S)
        assert worker.values()["w"] == [1.0] * 3
    step.result()
    assert worker.values()["w"] == [0.0] * 3


def test_the_install_waits_for_who_holds_the_lock(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2, session_class=Announced) for index in range(2)]
    start_all(workers)
    read, other = workers
    assert isinstance(read.session, Announced)
    read.give(w=2.0)
    other.give(w=4.0)
    step = Running(read.opt.step)
    assert read.session.push_begins.wait(TIMEOUT_S)
    assert read.opt.lock.acquire(timeout=TIMEOUT_S)
    try:
        together(other.opt.step)
        assert read.session.push_is_over.wait(TIMEOUT_S)
        assert not step.finishes_within(QUIET_S)
        assert read.values()["w"] == [-1.0] * 3
    finally:
        read.opt.lock.release()
    step.result()
    assert read.values()["w"] == [-2.0] * 3


def test_the_lock_is_free_while_a_worker_waits_at_the_barrier(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    first, second = workers
    step = Running(lambda: first.step(w=2.0))
    wait_for_status(server, lambda status: any(w.worker_id == "worker-0" and w.waiting for w in status.workers))
    assert first.opt.lock.acquire(timeout=TIMEOUT_S)
    first.opt.lock.release()
    second.step(w=4.0)
    step.result()


class WatchedLock:
    """Looks at something whenever it was just taken and is just about to be released."""

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self.seen = list[object]()

    def __enter__(self) -> WatchedLock:
        self.seen.append(self._look())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seen.append(self._look())


def test_whenever_the_lock_is_free_the_model_is_whole(alone: Join) -> None:
    worker = alone(interval_steps=2)
    watched = WatchedLock(worker.values)
    worker.opt.lock = watched  # type: ignore[assignment]
    start, trained = worker.values(), {"w": [-4.0] * 3, "b": [-3.0] * 3}
    worker.step(w=5.0, b=5.0)
    worker.opt.get_init_op()()
    assert watched.seen == [start, trained, trained, start]


def test_without_use_locking_no_lock_is_taken(alone: Join) -> None:
    worker = alone(use_locking=False)
    with worker.opt.lock:
        Running(lambda: worker.step(w=1.0)).result()
    assert worker.opt.global_step == 1


# Which variables, and which bits.


def average_of_equals(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Sum, then divide, as the server does it."""
    total = np.zeros_like(values)
    for _ in range(count):
        total += values
    average: NDArray[np.float32] = total / np.float32(count)
    return average


def drifting_value(count: int) -> float:
    """A number for which averaging ``count`` equal values gives another one, in float32."""
    values = np.linspace(0.1, 1.0, 1000, dtype=np.float32)
    return float(values[average_of_equals(values, count) != values][0])


def test_a_variable_without_a_gradient_keeps_its_bits_everywhere(start_server: StartServer, join: Join) -> None:
    count = 7
    value = drifting_value(count)
    server = start_server(num_workers=count)
    workers = [join(server, Net(b=value), index=index, num_worker=count) for index in range(count)]
    start_all(workers)
    for _ in range(2):
        together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    for worker in workers:
        assert worker.values() == {"w": [-1.0] * 3, "b": [value] * 3}
    assert center_of(server)["b"].tolist() == [value] * 3


def test_untouched_means_in_this_round(start_server: StartServer, join: Join) -> None:
    count = 7
    values = np.linspace(0.1, 1.0, 10_000, dtype=np.float32)
    once = average_of_equals(values, count)
    start, expected = next(
        (float(value), float(first))
        for value, first, second in zip(values, once, average_of_equals(once, count), strict=True)
        if value != first != second
    )
    server = start_server(num_workers=count)
    workers = [join(server, Net(b=start), index=index, num_worker=count) for index in range(count)]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(b=0.0)) for worker in workers))
    assert workers[0].values()["b"] == [expected] * 3
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[expected] * 3] * count


def test_a_variable_without_a_gradient_is_left_alone_even_where_it_differs_from_the_center(alone: Join) -> None:
    worker = alone()
    with torch.no_grad():
        worker.model.get_parameter("b").fill_(9.0)
    worker.step(w=1.0)
    assert worker.values()["b"] == [9.0] * 3
    assert worker.session.pull(timeout_s=TIMEOUT_S)[0]["b"].tolist() == [2.0] * 3


def test_a_gradient_in_any_step_of_the_interval_touches(alone: Join) -> None:
    worker = alone(interval_steps=2)
    worker.step(w=1.0)
    worker.step(b=1.0)
    center, _ = worker.session.pull(timeout_s=TIMEOUT_S)
    assert {name: value.tolist() for name, value in center.items()} == {"w": [0.0] * 3, "b": [1.0] * 3}


def test_a_gradient_of_none_on_one_worker_is_averaged_like_the_others(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    first, second = workers
    together(lambda: first.step(w=1.0, b=2.0), lambda: second.step(w=1.0))
    assert first.values() == second.values() == {"w": [0.0] * 3, "b": [1.0] * 3}


def test_a_parameter_that_the_optimizer_does_not_update_keeps_its_bits(start_server: StartServer, join: Join) -> None:
    count = 3
    value = drifting_value(count)
    server = start_server(num_workers=count)
    workers = [
        join(
            server,
            Net(b=value),
            index=index,
            num_worker=count,
            local=lambda own: torch.optim.SGD([next(own)], lr=1.0),
        )
        for index in range(count)
    ]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(w=1.0, b=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[value] * 3] * count


def test_a_parameter_that_another_optimizer_updates_is_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [
        join(server, index=index, num_worker=2, local=lambda own: torch.optim.SGD([next(own)], lr=1.0))
        for index in range(2)
    ]
    start_all(workers)
    for worker, rate in zip(workers, (1.0, 3.0), strict=True):
        worker.give(b=1.0)
        torch.optim.SGD([worker.model.get_parameter("b")], lr=rate).step()
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.values()["b"] for worker in workers] == [[0.0] * 3] * 2


def batch_norm() -> torch.nn.Module:
    return torch.nn.BatchNorm1d(2, momentum=0.5)


def test_floating_point_buffers_are_averaged_and_integer_buffers_stay_local(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, batch_norm(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)

    def train(worker: Worker, batches: int, value: float) -> None:
        for _ in range(batches):
            worker.model(torch.full((4, 2), value))
        worker.step()

    together(lambda: train(workers[0], 1, 2.0), lambda: train(workers[1], 2, 4.0))
    # 0 -> 1 on the first worker, 0 -> 2 -> 3 on the second.
    for worker, batches in zip(workers, (1, 2), strict=True):
        assert worker.model.get_buffer("running_mean").tolist() == [2.0, 2.0]
        assert worker.model.get_buffer("running_var").tolist() == [0.375, 0.375]
        assert worker.model.get_buffer("num_batches_tracked").item() == batches
    assert set(center_of(server)) == {"weight", "bias", "running_mean", "running_var"}


def test_without_average_buffers_exactly_what_is_trained_is_averaged(alone: Join) -> None:
    worker = alone(batch_norm(), average_buffers=False)
    worker.model(torch.full((4, 2), 2.0))
    worker.step(weight=1.0)
    assert set(worker.session.pull(timeout_s=TIMEOUT_S)[0]) == {"weight", "bias"}
    assert worker.model.get_buffer("running_mean").tolist() == [1.0, 1.0]


class RunningMean(torch.nn.Module):
    """Keeps a buffer as many people write it: by assigning a new tensor to it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x
        return self.w * x


def test_a_buffer_that_the_model_assigns_anew_is_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, RunningMean(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    for worker, value in zip(workers, (2.0, 4.0), strict=True):
        worker.model(torch.full((3,), value))
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.model.get_buffer("mean").tolist() for worker in workers] == [[1.5] * 3] * 2


@pytest.mark.parametrize("value", [drifting_value(3), torch.finfo(torch.float32).min])
def test_a_buffer_that_nobody_changed_keeps_its_bits(value: float, start_server: StartServer, join: Join) -> None:
    count = 3
    server = start_server(num_workers=count)
    workers = []
    for index in range(count):
        model = Net()
        model.register_buffer("mask", torch.full((3,), value))
        workers.append(join(server, model, index=index, num_worker=count))
    start_all(workers)
    together(*((lambda worker=worker: worker.step(w=1.0)) for worker in workers))
    assert [worker.model.get_buffer("mask").tolist() for worker in workers] == [[value] * 3] * count


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, bias=False)
        self.outer = torch.nn.Linear(2, 2, bias=False)
        self.outer.weight = self.inner.weight


def test_tied_weights_count_once_and_stay_tied(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, Tied(), index=index, num_worker=2) for index in range(2)]
    start_all(workers)
    start = workers[0].model.get_parameter("inner.weight").detach().clone()
    first, second = workers
    together(lambda: first.step(**{"inner.weight": 1.0}), lambda: second.step(**{"inner.weight": 3.0}))
    assert set(center_of(server)) == {"inner.weight"}
    for worker in workers:
        assert worker.model.get_parameter("outer.weight") is worker.model.get_parameter("inner.weight")
        torch.testing.assert_close(worker.model.get_parameter("outer.weight").detach(), start - 2.0)


def test_frozen_parameters_are_not_sent(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=1)
    model = Net()
    model.b.requires_grad_(False)
    worker = join(server, model)
    worker.start()
    worker.step(w=1.0)
    assert set(center_of(server)) == {"w"}
    assert worker.values() == {"w": [0.0] * 3, "b": [2.0] * 3}


class Assorted(torch.nn.Module):
    """Every element type and every odd shape in one model."""

    def __init__(self) -> None:
        super().__init__()
        tensors = {
            "in_float32": torch.full((2, 3), 2.0),
            "in_float64": torch.full((3,), 2.0, dtype=torch.float64),
            "in_float16": torch.full((5,), 2.0, dtype=torch.float16),
            "in_bfloat16": torch.full((3, 1), 2.0, dtype=torch.bfloat16),
            "scalar": torch.tensor(2.0),
            "bfloat16_scalar": torch.tensor(2.0, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 4),
            "transposed": torch.full((2, 3), 2.0).t(),
            "strided": torch.full((6,), 2.0, dtype=torch.bfloat16)[::2],
        }
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


def test_all_element_types_and_shapes_are_averaged_in_one_model(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, Assorted(), index=index, num_worker=2) for index in range(2)]
    layout = {name: (p.dtype, p.shape, p.stride()) for name, p in workers[0].model.named_parameters()}
    start_all(workers)
    first, second = workers
    together(lambda: first.step(**dict.fromkeys(layout, 1.0)), lambda: second.step(**dict.fromkeys(layout, -4.0)))
    for worker in workers:
        for name, parameter in worker.model.named_parameters():
            assert (parameter.dtype, parameter.shape, parameter.stride()) == layout[name]
            assert torch.equal(parameter.detach(), torch.full_like(parameter, 3.5)), name


def test_sixteen_bit_variables_do_not_overflow_on_the_way_to_their_average(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(num_workers=2)
    largest = torch.finfo(torch.float16).max
    workers = [
        join(
            server, torch.nn.ParameterDict({"x": torch.full((3,), largest, dtype=torch.float16)}), index=i, num_worker=2
        )
        for i in range(2)
    ]
    start_all(workers)
    together(*((lambda worker=worker: worker.step(x=0.0)) for worker in workers))
    assert workers[0].values() == workers[1].values() == {"x": [largest] * 3}


def test_a_sparse_gradient_is_applied_and_the_whole_variable_averaged(alone: Join) -> None:
    worker = alone(torch.nn.Embedding(4, 2, sparse=True))
    before = worker.model.get_parameter("weight").detach().clone()
    worker.opt.minimize(lambda: worker.model(torch.tensor([1, 1])).sum(), global_step=0)
    after = worker.model.get_parameter("weight").detach()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(after[1], before[1] - 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use (CUDA)")
def test_parameters_on_a_gpu_are_averaged(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, Assorted(), index=index, num_worker=2, worker_device="cuda") for index in range(2)]
    start_all(workers)
    first, second = workers
    names = [name for name, _ in first.model.named_parameters()]
    together(lambda: first.step(**dict.fromkeys(names, 1.0)), lambda: second.step(**dict.fromkeys(names, -4.0)))
    for worker in workers:
        for name, parameter in worker.model.named_parameters():
            assert parameter.is_cuda
            assert torch.equal(parameter.detach(), torch.full_like(parameter, 3.5)), name


# What does not fit, and what fails.


@pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
def test_a_model_that_does_not_fit_the_center_is_refused_naming_variable_and_shapes(
    index: int, start_server: StartServer, join: Join
) -> None:
    server = start_server(num_workers=2)
    join(server, num_worker=2).start()
    model = Net()
    model.b = torch.nn.Parameter(torch.zeros(2, 2))
    misfit = join(server, model, index=index, num_worker=2)
    with pytest.raises(ConflictError, match=r"variable 'b' is float32\[2, 2\] .* but float32\[3\]") as refused:
        misfit.start()
    assert "\n" not in str(refused.value)
    assert misfit.values() == {"w": [1.0] * 3, "b": [[0.0, 0.0], [0.0, 0.0]]}


def test_a_round_that_fails_leaves_the_local_variables_untouched(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    worker = join(server, num_worker=2)
    worker.start()
    step = Running(lambda: worker.step(w=1.0, b=1.0))
    wait_for_status(server, lambda status: any(w.worker_id == "worker-0" and w.waiting for w in status.workers))
    server.stop()
    with pytest.raises(ServerUnavailableError):
        step.result()
    assert worker.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    assert (worker.opt.local_step, worker.opt.global_step, worker.opt.last_round) == (1, 0, None)


def test_a_round_that_failed_can_be_tried_again(start_server: StartServer, join: Join) -> None:
    server = start_server(num_workers=2)
    workers = [join(server, index=index, num_worker=2, session_class=ShortPatience) for index in range(2)]
    start_all(workers)
    first, second = workers
    assert isinstance(first.session, ShortPatience)
    first.session.patience_s = QUIET_S
    with pytest.raises(DeadlineExceededError, match="the round did not commit"):
        first.step(w=1.0, b=1.0)
    assert first.values() == {"w": [0.0] * 3, "b": [1.0] * 3}
    first.session.patience_s = None
    together(first.opt.average, lambda: second.step(w=3.0, b=3.0))
    assert first.values() == second.values() == {"w": [-1.0] * 3, "b": [0.0] * 3}
    assert (first.opt.local_step, first.opt.global_step) == (1, 1)
