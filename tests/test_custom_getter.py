"""Which tensors of a model are center variables, and what they are called."""

from __future__ import annotations

import pytest
import torch

from ma_client import GLOBAL_VARIABLE_NAME, ModelAverageCustomGetter


class Net(torch.nn.Module):
    """One of each kind of tensor that a model can have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)
        self.tied = torch.nn.Linear(2, 3)
        self.tied.weight = self.layer.weight
        self.frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("scale", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_what_is_trained_and_floating_point_buffers_are_center_variables_in_the_models_order() -> None:
    getter = ModelAverageCustomGetter("cpu")
    getter(Net())
    assert list(getter.variables()) == ["layer.weight", "layer.bias", "tied.bias", "mean", "scale"]


def test_without_average_buffers_exactly_what_is_trained() -> None:
    getter = ModelAverageCustomGetter("cpu", average_buffers=False)
    getter(Net())
    assert list(getter.variables()) == ["layer.weight", "layer.bias", "tied.bias"]


def test_buffers_are_averaged_unless_told_otherwise() -> None:
    assert ModelAverageCustomGetter("cpu").average_buffers


def test_the_variables_are_the_models_own_tensors() -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = getter(Net())
    variables = getter.variables()
    assert variables["layer.weight"] is model.get_parameter("layer.weight")
    assert variables["mean"] is model.get_buffer("mean")


def test_it_returns_the_model_itself_on_the_workers_device() -> None:
    model = Net()
    getter = ModelAverageCustomGetter("meta")
    assert getter(model) is model
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert getter.model is model


def test_center_names_are_the_originals() -> None:
    assert GLOBAL_VARIABLE_NAME == "global_center_variable"
    getter = ModelAverageCustomGetter("cpu", average_buffers=False)
    getter(torch.nn.Linear(2, 3))
    assert getter.local_to_center == {
        "weight": "global_center_variable/weight",
        "bias": "global_center_variable/bias",
    }


def test_a_second_model_is_refused() -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = getter(Net())
    with pytest.raises(ValueError, match="has a model already; make one getter for each model"):
        getter(Net())
    assert getter.model is model


def test_before_there_is_a_model_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="has no model yet: call it"):
        ModelAverageCustomGetter("cpu").variables()


def test_an_element_type_that_cannot_be_averaged_is_refused_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.complex64))
    getter = ModelAverageCustomGetter("cpu")
    with pytest.raises(ValueError, match=r"variable '1.weight' has dtype complex64; only float32, .* can be averaged"):
        getter(model)
    getter(Net())  # the refused model has left no trace


def test_a_device_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(RuntimeError, match="ps_device"):
        ModelAverageCustomGetter("ps_device")
