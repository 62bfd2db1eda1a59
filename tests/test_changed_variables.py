"""The center's variables are fixed, but users may change their tensors: the next push names what changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize, prune

from ma_client.tensors.mirror import HostMirror
from modelaverage.errors import ConflictError, Reason
from tests.optimizer.conftest import alone, join
from tests.optimizer.workers import Join, Net, Worker

pytestmark = pytest.mark.in_memory

__all__ = ["alone", "join"]

Change = Callable[[torch.nn.Sequential], object]


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


def replaced(model: torch.nn.Sequential) -> None:
    model[1].running_mean = torch.zeros(5)


CHANGES: dict[str, tuple[Change, str]] = {
    "pruned": (
        lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),  # type: ignore[no-untyped-call]
        r"variable '0.weight' is no longer in the model \(the model has '0.weight_orig' now\)",
    ),
    "parametrized": (
        lambda model: parametrize.register_parametrization(model[0], "weight", torch.nn.Tanh()),
        r"variable '0.weight' is no longer .* \(the model has '0.parametrizations.weight.original' now\)",
    ),
    "normed": (
        lambda model: torch.nn.utils.parametrizations.weight_norm(model[0]),
        r"variable '0.weight' is no longer .*'0.parametrizations.weight.original0' now",
    ),
    "removed": (lambda model: model.pop(1), "variable '1.weight', and 3 more, are no longer in the model"),
    "a buffer replaced": (replaced, r"variable '1.running_mean' is float32\[5\] now and float32\[2\]"),
    "a buffer resized": (
        lambda model: model.get_buffer("1.running_var").resize_(3),
        r"variable '1.running_var' is float32\[3\] now and float32\[2\]",
    ),
    "a parameter resized": (
        lambda model: setattr(model[0].bias, "data", torch.zeros(7)),
        r"variable '0.bias' is float32\[7\] now and float32\[2\]",
    ),
    "converted": (lambda model: model.half(), r"variable '0.weight' is float16\[2, 2\] now and float32\[2, 2\]"),
    "a parameter of another shape": (
        lambda model: setattr(model[0], "bias", torch.nn.Parameter(torch.zeros(3))),
        r"variable '0.bias' is float32\[3\] now and float32\[2\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_variable_that_changed_is_named_at_the_push_and_nothing_is_sent(
    alone: Join, change: Change, message: str
) -> None:
    worker = alone(net())
    assert isinstance(worker.model, torch.nn.Sequential)
    change(worker.model)
    for again in (worker.opt.average, worker.opt.get_init_op()):
        with pytest.raises(ConflictError, match=message) as refused:
            again()
        assert refused.value.reason is Reason.MANIFEST_MISMATCH
        assert "in the center, whose variables are fixed when the chief initializes it" in str(refused.value)
        assert "before you make the optimizer" in str(refused.value)
    status = worker.session.status()
    assert (status.global_step, [w.worker_id for w in status.workers if w.fragments_given]) == (0, [])


def test_a_worker_goes_on_when_the_change_is_undone(alone: Join) -> None:
    worker = alone(net())
    assert isinstance(worker.model, torch.nn.Sequential)
    norm = worker.model.pop(1)
    with pytest.raises(ConflictError):
        worker.opt.average()
    worker.model.append(norm)
    worker.opt.average()
    assert worker.opt.global_step == 1


def test_a_buffer_that_a_module_assigns_is_followed(alone: Join) -> None:
    worker = alone(net())
    worker.model.get_submodule("1").running_mean = torch.full((2,), 3.0)
    worker.opt.average()
    center, _ = worker.session.pull()
    assert center["1.running_mean"].tolist() == [3.0, 3.0]


def test_a_variable_that_is_frozen_in_training_stays_a_center_variable(alone: Join) -> None:
    worker = alone()
    worker.model.requires_grad_(False)
    worker.opt.average()
    assert worker.opt.global_step == 1


# The user's storage.


def tensors_of(worker: Worker) -> dict[str, torch.Tensor]:
    return dict(worker.model.named_parameters()) | dict(worker.model.named_buffers())


def test_every_tensor_can_be_resized_after_start_and_rounds(alone: Join) -> None:
    worker = alone(net())
    worker.opt.average()
    for name, tensor in tensors_of(worker).items():
        tensor.data.resize_(tensor.numel() + 100)
        assert tensor.untyped_storage().resizable(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gather_and_scatter_leave_a_storage_resizable(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, dtype=dtype)
    mirror = HostMirror({"x": tensor})
    mirror.scatter({"x": mirror.gather()["x"].copy()})
    assert tensor.untyped_storage().resizable()
    tensor.resize_(1000)
    assert tensor[:3].tolist() == [1.0] * 3


def test_an_array_keeps_its_tensors_memory() -> None:
    array = HostMirror({"x": torch.full((100_000,), 7.0)}).gather()["x"]
    for _ in range(3):
        torch.zeros(100_000)
    assert array.min() == array.max() == 7.0


def test_a_buffer_that_is_empty_at_the_start_goes_through_rounds(alone: Join) -> None:
    model = Net()
    model.register_buffer("seen", torch.zeros(0))
    worker = alone(model)
    worker.opt.average()
    worker.model.get_buffer("seen").resize_(3)
    with pytest.raises(ConflictError, match=r"variable 'seen' is float32\[3\] now and float32\[0\]"):
        worker.opt.average()


# Staging.


@pytest.mark.parametrize("device", ["meta"])
def test_staging_is_on_the_host_whatever_the_default_device_is(device: str) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    with torch.device(device):
        mirror = HostMirror({"x": tensor})
        array = mirror.gather()["x"]
        mirror.scatter({"x": array + np.float32(1.0)})
    assert tensor.tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]


def test_a_round_under_another_default_device_and_type(alone: Join) -> None:
    model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = model.weight.tolist()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        worker = alone(model)
        worker.opt.average()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert model.weight.tolist() == before
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_negated_view_is_averaged_by_its_values() -> None:
    tensor = torch._neg_view(torch.tensor([1.0, -2.0]))
    mirror = HostMirror({"x": tensor})
    assert mirror.gather()["x"].tolist() == [-1.0, 2.0]
    mirror.scatter({"x": np.array([3.0, 4.0], np.float32)})
    assert tensor.tolist() == [3.0, 4.0]
