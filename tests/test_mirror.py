"""Tensors as numpy arrays: without a copy where that is possible, else through memory that is reused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from ma_client.tensors.mirror import HostMirror
from modelaverage.errors import ConflictError


def test_a_contiguous_tensor_on_the_cpu_is_not_copied() -> None:
    tensors = {
        "float32": torch.nn.Parameter(torch.ones(2, 3)),
        "bfloat16": torch.ones(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
    }
    for name, array in HostMirror(tensors).gather().items():
        assert array.ctypes.data == tensors[name].data_ptr()


def test_a_tensor_that_is_not_contiguous_goes_through_memory_that_is_used_again() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    mirror = HostMirror({"x": tensor})
    first = mirror.gather()["x"]
    tensor.add_(1.0)
    second = mirror.gather()["x"]
    assert second.ctypes.data == first.ctypes.data != tensor.data_ptr()
    assert second.tolist() == tensor.tolist()


def test_a_tensor_that_was_given_other_memory_is_read_and_written_there() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    mirror = HostMirror({"x": parameter})
    first = mirror.gather()
    parameter.data = torch.ones(100_000)  # as DistributedDataParallel and others do
    assert mirror.gather() is not first
    assert (mirror.gather()["x"] == 1.0).all()
    parameter.data = torch.zeros(100_000)
    mirror.scatter({"x": np.full(100_000, 2.0, np.float32)})
    assert bool((parameter == 2.0).all())


def test_a_tensor_that_has_lost_its_memory_or_changed_its_shape_is_refused() -> None:
    tensor = torch.zeros(100_000)
    mirror = HostMirror({"x": tensor})
    center = {"x": np.ones(100_000, np.float32)}
    mirror.scatter(center)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ConflictError, match=r"'x' of shape .* has no memory"):
        mirror.gather()
    with pytest.raises(ConflictError, match=r"'x' of shape .* has no memory"):
        mirror.scatter(center)
    tensor.data = torch.zeros(5)
    with pytest.raises(ConflictError, match=r"'x' is float32\[5\] now"):
        mirror.scatter(center)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        lambda values: values,
        lambda values: values.t(),
        lambda values: values[:, ::2],
        lambda values: values[0, 1],
        lambda values: values[:0],
    ],
    ids=["plain", "transposed", "strided", "scalar", "empty"],
)
def test_gather_and_scatter_are_exact_for_every_layout_and_element_type(layout: object, dtype: torch.dtype) -> None:
    assert callable(layout)
    source: torch.Tensor = layout(torch.tensor([[1.5, -2.0, 3.25], [float("inf"), -0.0, 1e-5]], dtype=dtype))
    target: torch.Tensor = layout(torch.zeros(2, 3, dtype=dtype))
    address, strides = target.data_ptr(), target.stride()
    HostMirror({"x": target}).scatter(HostMirror({"x": source}).gather())
    assert torch.equal(target, source)
    assert (target.data_ptr(), target.stride()) == (address, strides)


def test_bfloat16_is_ml_dtypes_bfloat16() -> None:
    array = HostMirror({"x": torch.tensor([1.5], dtype=torch.bfloat16)}).gather()["x"]
    assert array.dtype == np.dtype(ml_dtypes.bfloat16)
    assert array.tolist() == [1.5]


def test_scatter_leaves_out_what_it_is_told_to_skip() -> None:
    kept, written = torch.zeros(2), torch.zeros(2)
    HostMirror({"kept": kept, "written": written}).scatter({"written": np.ones(2, np.float32)}, skip={"kept"})
    assert (kept.tolist(), written.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_scatter_copies_what_it_is_given() -> None:
    tensor, array = torch.zeros(2), np.ones(2, np.float32)
    HostMirror({"x": tensor}).scatter({"x": array})
    array[:] = 7.0
    assert tensor.tolist() == [1.0, 1.0]


def test_parameters_that_require_a_gradient_can_be_written() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3).t())
    HostMirror({"x": parameter}).scatter({"x": np.ones((3, 2), np.float32)})
    assert parameter.requires_grad
    assert parameter.tolist() == [[1.0, 1.0]] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use (CUDA)")
def test_a_tensor_on_a_gpu_goes_through_pinned_memory_that_is_used_again() -> None:
    tensor = torch.arange(6.0, device="cuda").reshape(2, 3)
    mirror = HostMirror({"x": tensor})
    first = mirror.gather()["x"]
    assert torch.from_numpy(first).is_pinned()
    mirror.scatter({"x": np.ones((2, 3), np.float32)})
    assert tensor.tolist() == [[1.0] * 3] * 2
    assert mirror.gather()["x"].ctypes.data == first.ctypes.data
