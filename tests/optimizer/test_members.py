"""The members that the optimizer shares with the original, with a real server and one real session per worker."""

from __future__ import annotations

import inspect
import os

import pytest
import torch

from ma_client import ClusterError, ModelAverageCustomGetter, ModelAverageOptimizer
from modelaverage.errors import ModelAverageError
from tests.conftest import StartServer
from tests.optimizer.workers import (
    QUIET_S,
    TIMEOUT_S,
    Join,
    Net,
    Running,
    Worker,
    momentum,
    start_all,
    together,
    wait_for_status,
)
from tests.recorded import without_a_cluster

pytestmark = pytest.mark.in_memory

# The constructor.


def test_the_constructor_has_the_originals_parameters_and_the_new_ones_are_keyword_only() -> None:
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
        "outer_optimizer": None,
        "compression": None,
        "overlap_steps": 0,
        "weight": 1.0,
        "nonfinite": "allow",
        "process_group": None,
    }
    assert list(parameters) == [
        *("opt", "num_worker", "is_chief", "ma_custom_getter", "interval_steps", "use_locking", "name"),
        *("session", "outer_optimizer", "compression", "overlap_steps", "weight", "nonfinite", "process_group"),
    ]
    kinds = [parameter.kind for parameter in parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 7 + [inspect.Parameter.KEYWORD_ONLY] * 7


@pytest.mark.parametrize("settings", [{"interval_steps": 0}, {"interval_steps": -1}, {"num_worker": 0}])
def test_numbers_below_one_are_refused(settings: dict[str, int], start_server: StartServer, join: Join) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} {value} is not a whole number from 1 up"):
        join(start_server(1), **settings)


def test_a_parameter_that_is_not_in_the_getters_model_is_refused(start_server: StartServer, join: Join) -> None:
    foreign = torch.nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shape \[2, 5\] that is not in the model given to ma_custom_getter"):
        join(start_server(1), local=lambda own: torch.optim.SGD([*own, foreign], lr=1.0))


def test_is_chief_that_contradicts_the_session_is_refused(alone: Join) -> None:
    worker = alone()
    getter = ModelAverageCustomGetter("cpu")
    local = torch.optim.SGD(getter(Net()).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="is_chief is False, but the session was made with is_chief=True"):
        ModelAverageOptimizer(local, 1, False, getter, session=worker.session)


def test_num_worker_other_than_the_servers_is_refused_with_both_numbers(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(2), num_worker=3)
    with pytest.raises(ValueError, match="num_worker is 3, but the server was started with --num-workers 2"):
        worker.start()


def test_without_a_session_the_environment_says_who_is_who(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MA_PS_HOSTS", start_server(1).address)
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
    for name in os.environ.keys() - without_a_cluster(os.environ).keys():
        monkeypatch.delenv(name)
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
    with pytest.raises(ValueError, match="gate_gradients 3 is not one of GATE_NONE, GATE_OP, GATE_GRAPH"):
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
    server = start_server(3)
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
    server = start_server(1)
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
    server = start_server(1)
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
    server = start_server(2)
    workers = [join(server, index=index, num_worker=2, local=momentum) for index in range(2)]
    start_all(workers)
    first, second = workers
    for _ in range(3):
        together(lambda: first.step(w=1.0, b=1.0), lambda: second.step(w=4.0, b=4.0))
    assert first.values() == second.values()
    for worker, gradient in ((first, 1.0), (second, 4.0)):
        buffer = worker.opt.get_slot(worker.model.get_parameter("w"), "momentum_buffer")
        assert buffer.tolist() == [1.75 * gradient] * 3
