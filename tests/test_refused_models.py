"""Tensors that are not plain arrays are refused by name, with advice; or they stay local, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer
from modelaverage.errors import ConflictError
from tests.conftest import StartServer
from tests.optimizer.conftest import alone, join
from tests.optimizer.workers import Join, sgd

__all__ = ["alone", "join"]

# torch's own warnings about its old or new features.
pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def with_weight(weight: torch.Tensor, trained: bool = True) -> torch.nn.Module:
    model = net()
    model[1].weight = torch.nn.Parameter(weight, requires_grad=trained)
    return model


def with_buffer(buffer: torch.Tensor) -> torch.nn.Module:
    model = net()
    model[1].register_buffer("kept", buffer)
    return model


def refused(model: torch.nn.Module, message: str) -> None:
    getter = ModelAverageCustomGetter("cpu")
    with pytest.raises(ValueError, match=message):
        getter(model)
    getter(net())  # the refused model has left no trace


# Sharded models.


def fsdp1(model: torch.nn.Module, use_orig_params: bool = False) -> torch.nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=use_orig_params)


def fsdp2(model: torch.nn.Module) -> torch.nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


SHARDED: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "FSDP1": fsdp1,
    "FSDP1 with the original parameters": lambda model: fsdp1(model, use_orig_params=True),
    "FSDP2": fsdp2,
}
ALONE = ("FSDP1 with the original parameters", "FSDP2")
WHAT_TO_DO = ".*a part of it; make the ranks one worker with ModelAverageOptimizer.*process_group"


def refused_alone(model: torch.nn.Module, message: str) -> None:
    """A worker of one process refuses it."""
    getter = ModelAverageCustomGetter("cpu")
    with pytest.raises(ValueError, match=message):
        ModelAverageOptimizer(sgd(getter(model).parameters()), 1, True, getter)


@pytest.mark.parametrize("shard", [SHARDED[name] for name in ALONE], ids=ALONE)
@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_refused(shard: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    refused_alone(shard(net()), "the model is sharded by FSDP" + WHAT_TO_DO)


@pytest.mark.usefixtures("one_process")
def test_a_flat_parameter_is_refused_because_what_is_in_it_has_no_names() -> None:
    refused(fsdp1(net()), "flat parameter of FSDP, .*use_orig_params=True")


@pytest.mark.parametrize("shard", [SHARDED[name] for name in ALONE], ids=ALONE)
@pytest.mark.usefixtures("one_process")
def test_a_model_with_a_sharded_module_is_refused_and_the_module_named(
    shard: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    model = net()
    model[1] = shard(model[1])
    refused_alone(model, "module '1' of the model is sharded by FSDP" + WHAT_TO_DO)


@pytest.mark.parametrize("shard", [SHARDED[name] for name in ALONE], ids=ALONE)
@pytest.mark.usefixtures("one_process")
def test_a_model_that_is_sharded_after_the_optimizer_was_made_is_refused_at_the_start(
    shard: Callable[[torch.nn.Module], torch.nn.Module], start_server: StartServer, join: Join
) -> None:
    worker = join(start_server(1), net())
    shard(worker.model)
    with pytest.raises(ConflictError, match=r"a part of it|each rank has a part"):
        worker.opt.begin()


@pytest.mark.usefixtures("one_process")
def test_a_model_that_is_sharded_in_training_is_refused_at_the_next_round(alone: Join) -> None:
    worker = alone(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    fsdp2(worker.model)
    with pytest.raises(ConflictError, match=r"variable '0.weight' is a DTensor, of which each rank has a part"):
        worker.opt.average()
    assert worker.session.status().global_step == 0


@pytest.mark.usefixtures("one_process")
def test_a_distributed_tensor_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()])
    refused_alone(with_weight(weight), "variable '1.weight' is a DTensor, of which each rank has a part")


# Tensors that are not plain.


class Scaled(torch.Tensor):
    """A tensor with a meaning of its own."""


def test_a_parameter_of_a_tensor_subclass_is_refused_by_name_and_class() -> None:
    message = "variable '1.weight' is a tests.test_refused_models.Scaled, and only plain tensors are averaged; .*freeze"
    refused(with_weight(torch.ones(2, 2).as_subclass(Scaled)), message)


def test_a_buffer_of_a_tensor_subclass_is_refused_by_name_and_class() -> None:
    model = with_buffer(torch.ones(2).as_subclass(Scaled))
    refused(model, "variable '1.kept' is a tests.test_refused_models.Scaled")
    ModelAverageCustomGetter("cpu", average_buffers=False)(model)  # as the message says


def test_a_frozen_parameter_may_be_anything() -> None:
    getter = ModelAverageCustomGetter("cpu")
    getter(with_weight(torch.ones(2, 2).as_subclass(Scaled), trained=False))
    assert list(getter.variables()) == ["0.weight", "0.bias", "1.bias"]


def test_plain_parameters_and_buffers_made_in_every_way_are_averaged() -> None:
    model = with_weight(torch.nn.Parameter(torch.ones(2, 2)))
    model.kept = torch.nn.Buffer(torch.ones(2))
    getter = ModelAverageCustomGetter("cpu")
    getter(model)
    assert getter.variables().keys() >= {"1.weight", "kept"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (torch.nn.Sequential(torch.nn.LazyLinear(2)), "0.weight"),
        (torch.nn.LazyBatchNorm1d(affine=False), "running_mean"),
    ],
    ids=["parameter", "buffer"],
)
def test_what_has_no_shape_yet_is_refused_by_name_until_a_batch_has_run(model: torch.nn.Module, name: str) -> None:
    refused(model, f"variable '{name}' has no shape yet .*: run a batch through the model")
    model(torch.ones(3, 2))
    ModelAverageCustomGetter("cpu")(model)


@pytest.mark.parametrize("trained", [True, False])
def test_what_has_no_values_is_refused_by_name(trained: bool) -> None:
    refused(
        with_weight(torch.ones(2, 2, device="meta"), trained),
        r"variable '1.weight' is on the meta device and has no values: .*to_empty",
    )


def test_what_has_lost_its_memory_is_refused_by_name(alone: Join) -> None:
    worker = alone()
    worker.model.get_parameter("b").untyped_storage().resize_(0)
    with pytest.raises(ConflictError, match=r"variable 'b' of shape \[3\] has no memory"):
        worker.opt.average()
    assert worker.session.status().global_step == 0


# What stays local.

NOT_AVERAGED = {
    "int64": torch.tensor(0),
    "bool": torch.zeros(2, dtype=torch.bool),
    "complex64": torch.zeros(2, dtype=torch.complex64),
    "float8_e4m3fn": torch.zeros(2).to(torch.float8_e4m3fn),
    "sparse_coo": torch.zeros(2, 2).to_sparse(),
}


@pytest.mark.parametrize("kind", NOT_AVERAGED)
def test_a_buffer_that_cannot_be_averaged_stays_local_and_that_is_logged_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ma_client")
    getter = ModelAverageCustomGetter("cpu")
    model = getter(with_buffer(NOT_AVERAGED[kind]))
    for _ in range(2):
        assert "1.kept" not in getter.variables()
        getter.tensors(getter.variables())
    assert [record.getMessage() for record in caplog.records] == [
        f"stays local in each worker, because it cannot be averaged: 1.kept ({kind})"
    ]
    counts = kind in ("int64", "bool")
    assert caplog.records[0].levelname == ("INFO" if counts else "WARNING")
    assert model.get_buffer("1.kept").dtype == NOT_AVERAGED[kind].dtype


def test_of_many_that_stay_local_a_few_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ma_client")
    ModelAverageCustomGetter("cpu")(torch.nn.Sequential(*(torch.nn.BatchNorm1d(1) for _ in range(10))))
    (record,) = caplog.records
    assert record.getMessage().endswith("3.num_batches_tracked (int64) and 6 more")


@pytest.mark.parametrize("kind", ["complex64", "float8_e4m3fn"])
def test_a_trained_parameter_that_cannot_be_averaged_is_refused_by_name(kind: str) -> None:
    weight = NOT_AVERAGED[kind]
    refused(with_weight(weight), f"variable '1.weight' has dtype {kind}; only .* can be averaged: convert it")
    ModelAverageCustomGetter("cpu")(with_weight(weight, trained=False))


def test_a_trained_sparse_parameter_is_refused_by_name() -> None:
    refused(with_weight(NOT_AVERAGED["sparse_coo"]), "variable '1.weight' is sparse_coo, and only dense tensors")


# Additional variables.


def test_also_average_takes_parameters_without_gradients_and_buffers_by_pattern() -> None:
    model = torch.nn.ModuleDict({"student": torch.nn.Linear(1, 1), "teacher": torch.nn.BatchNorm1d(1)})
    model["teacher"].requires_grad_(False)
    model["teacher"].register_buffer("scratch", torch.zeros(1), persistent=False)
    getter = ModelAverageCustomGetter("cpu", average_buffers=False, also_average=["teacher.weight", "*.running_*"])
    getter(model)
    trained = ["student.weight", "student.bias"]
    assert list(getter.variables()) == [*trained, "teacher.weight", "teacher.running_mean", "teacher.running_var"]
    everything = ModelAverageCustomGetter("cpu", average_buffers=False, also_average="teacher.*")
    everything(model)
    teacher = ["weight", "bias", "running_mean", "running_var", "scratch"]
    assert list(everything.variables()) == [*trained, *(f"teacher.{name}" for name in teacher)]


@pytest.mark.parametrize("pattern", ["teacher", "1.weights", "1.count"])
def test_a_pattern_that_matches_nothing_that_can_be_averaged_is_refused(pattern: str) -> None:
    model = net()
    model[1].register_buffer("count", torch.tensor(0))
    with pytest.raises(ValueError, match=f"also_average has '{pattern}', which matches no parameter and no buffer"):
        ModelAverageCustomGetter("cpu", also_average=["1.*", pattern])(model)


def test_also_average_takes_names_only() -> None:
    with pytest.raises(TypeError, match="also_average has Linear; give names, such as 'teacher"):
        ModelAverageCustomGetter("cpu", also_average=[torch.nn.Linear(1, 1)])  # type: ignore[list-item]


def test_a_frozen_parameter_that_also_average_names_is_averaged_as_the_model_has_it(alone: Join) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))
            self.ema = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def trained(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return sgd(parameter for parameter in parameters if parameter.requires_grad)

    worker = alone(Pair(), also_average=["ema"], local=trained)
    worker.model.get_parameter("ema").fill_(3.0)
    worker.step(w=1.0)
    center, _ = worker.session.pull()
    assert {name: value.tolist() for name, value in center.items()} == {"w": [-1.0], "ema": [3.0]}
