"""The optimizer as torch expects one: schedulers, scalers, hooks, groups, checkpoints, closures."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from ma_client import Outcome
from modelaverage.errors import NotInitializedError
from tests.conftest import StartServer
from tests.optimizer.workers import TIMEOUT_S, Join, Net, Worker, center_of, momentum, outcome, start_all, together

pytestmark = pytest.mark.in_memory


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
    worker = join(start_server(1), local=lambda own: torch.optim.SGD([{"params": [next(own)], "lr": 1.0}], lr=0.0))
    worker.opt.add_param_group({"params": [worker.model.get_parameter("b")], "lr": 2.0})
    worker.start()
    worker.step(w=1.0, b=1.0)
    assert worker.values() == {"w": [0.0] * 3, "b": [0.0] * 3}
    assert [group["lr"] for group in worker.local.param_groups] == [1.0, 2.0]


def test_a_parameter_that_joined_the_model_late_can_be_added(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1))
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
    worker = join(start_server(1))
    with pytest.raises(ValueError, match="not in the model given to ma_custom_getter"):
        worker.opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(worker.opt.param_groups) == 1


def test_a_parameter_that_is_unfrozen_after_the_start_is_named(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1), interval_steps=1)
    name, parameter = next(iter(worker.model.named_parameters()))
    parameter.requires_grad_(False)
    worker.start()
    parameter.requires_grad_(True)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=f"'{name}' is trained, but was frozen"):
        worker.opt.step()


def restart(worker: Worker, again: Worker) -> None:
    """Saves a worker to a file and loads it into another one, as after a restart of its process."""
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
    server = start_server(1)
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
    server = start_server(1)
    stopped, again = (join(server, interval_steps=2) for _ in range(2))
    stopped.start()
    stopped.step(w=1.0)
    restart(stopped, again)
    again.step(b=1.0)
    assert again.opt.global_step == 1
    assert center_of(server)["w"].tolist() == [0.0] * 3


def test_a_restored_chief_gives_a_fresh_server_its_base_step(start_server: StartServer, join: Join) -> None:
    stopped, again = (join(start_server(1)) for _ in range(2))
    stopped.start()
    stopped.step(w=1.0)
    again.opt.load_state_dict(stopped.opt.state_dict())
    again.start()
    assert again.opt.global_step == 1


def test_a_state_dict_from_before_the_start_leaves_the_base_step_alone(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1))
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
    server = start_server(2)
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
    worker = join(start_server(1))
    with pytest.raises(NotInitializedError, match="pull the center"):
        worker.step(w=1.0)
