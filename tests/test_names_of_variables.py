"""A variable has the same name on every worker, no matter which of them wraps or compiles its model, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ma_client import ModelAverageCustomGetter
from tests.conftest import StartServer
from tests.optimizer.conftest import alone, join
from tests.optimizer.workers import Join, start_all, together

pytestmark = pytest.mark.in_memory

__all__ = ["alone", "join"]

Wrap = Callable[[torch.nn.Module], torch.nn.Module]


class Net(torch.nn.Module):
    """A model with a submodule that has the same name as a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.module(x))
        return normed


NAMES = ["module.weight", "module.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    wrapped: torch.nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped


WRAPPERS: dict[str, Wrap] = {
    "nothing": lambda module: module,
    "compile": compiled,
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "checkpoint": checkpoint_wrapper,
    "compile in DistributedDataParallel": lambda module: DistributedDataParallel(compiled(module)),
    "DistributedDataParallel in compile": lambda module: compiled(DistributedDataParallel(module)),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return WRAPPERS[request.param]


def names_of(model: torch.nn.Module) -> list[str]:
    getter = ModelAverageCustomGetter("cpu")
    getter(model)
    return list(getter.variables())


def test_a_wrapped_model_has_the_names_of_the_model(wrap: Wrap) -> None:
    assert names_of(wrap(Net())) == NAMES


def test_a_wrapper_around_a_part_of_a_model_adds_nothing_to_names(wrap: Wrap) -> None:
    model = Net()
    model.module, model.norm = wrap(model.module), wrap(model.norm)  # type: ignore[assignment]
    assert names_of(model) == NAMES
    assert names_of(torch.nn.Sequential(model)) == [f"0.{name}" for name in NAMES]


def test_a_model_may_be_wrapped_after_the_getter_has_it(wrap: Wrap) -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = getter(Net())
    before = getter.variables()
    model.module = wrap(model.get_submodule("module"))
    assert list(getter.variables()) == NAMES
    assert getter.tensors(NAMES).keys() == before.keys()
    assert all(tensor is before[name] for name, tensor in getter.tensors(NAMES).items())


def test_buffers_that_are_no_part_of_the_state_dict_stay_local_under_a_wrapper_too(wrap: Wrap) -> None:
    model = Net()
    model.norm.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert names_of(wrap(model)) == NAMES


def test_a_module_that_only_has_the_name_of_a_wrappers_keeps_it() -> None:
    model = torch.nn.Module()
    model._orig_mod = torch.nn.Module()
    model._orig_mod.module = torch.nn.Linear(1, 1)
    assert names_of(model) == ["_orig_mod.module.weight", "_orig_mod.module.bias"]


def test_a_module_of_a_subclass_of_a_wrapper_has_its_other_parameters_too() -> None:
    class WithScale(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__(module)
            self.scale = torch.nn.Parameter(torch.ones(1))

    assert names_of(WithScale(torch.nn.Linear(1, 1))) == ["scale", "weight", "bias"]


def test_two_variables_whose_names_differ_by_a_wrapper_only_are_refused_by_name() -> None:
    model = DataParallel(torch.nn.Linear(1, 1))
    model.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"'weight' and 'module.weight' are both 'weight' without .* rename one"):
        names_of(model)


def test_a_module_that_is_used_twice_is_averaged_once_under_its_first_name() -> None:
    layer = torch.nn.Linear(1, 1)
    assert names_of(torch.nn.Sequential(layer, compiled(layer))) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("late", [False, True], ids=["before the getter", "after it"])
def test_workers_with_and_without_a_wrapper_average_with_each_other(
    start_server: StartServer, join: Join, late: bool
) -> None:
    server = start_server(2)
    models = [torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)) for _ in range(2)]
    if not late:
        models[1] = compiled(models[1])  # type: ignore[call-overload]
    workers = [join(server, model, index=index, num_worker=2) for index, model in enumerate(models)]
    if late:
        models[1][0] = compiled(models[1][0])
    start_all(workers)
    (start,) = {next(worker.model.parameters()).item() for worker in workers}

    def step(index: int) -> Callable[[], None]:
        parameter = next(workers[index].model.parameters())
        parameter.grad = torch.full_like(parameter, float(index))
        return workers[index].opt.step

    together(step(0), step(1))
    assert [next(worker.model.parameters()).item() for worker in workers] == [start - 0.5] * 2
