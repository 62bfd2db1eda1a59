"""What is made once of tensors and arrays that are given in every round is made again when they change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ma_client import ModelAverageCustomGetter, ParameterServerSession
from ma_client.tensors.mirror import HostMirror
from ma_client.torch.tensor_places import TensorPlaces
from ma_client.values.same import SameArrays
from tests.conftest import StartServer


def test_same_arrays_cannot_be_changed() -> None:
    same = SameArrays(x=np.zeros(2))
    changes: list[Any] = [
        lambda: same.update(y=1),
        lambda: same.pop("x"),
        same.clear,
        same.popitem,
        lambda: same.setdefault("y", np.zeros(1)),
        lambda: same.__setitem__("x", np.ones(2)),
        lambda: same.__delitem__("x"),
        lambda: same.__ior__({"y": 1}),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="copy the dictionary"):
            change()
    assert list(same) == ["x"]


def test_a_user_gets_plain_dictionaries_whether_copied_or_not(start_server: StartServer) -> None:
    values = {"x": np.ones(300_000, np.float32), "y": np.ones(3, np.float32)}
    with ParameterServerSession([start_server(1).address], worker_id="worker-0", is_chief=True) as session:
        session.initialize(values)
        for copied in (True, False):
            result = session.push_and_average(values, copy=copied)
            pulled, _ = session.pull(copy=copied)
            for center in (result.center, pulled):
                assert type(center) is dict  # JAX takes subclasses for leaves
                center["z"] = 1  # the next center is another dictionary
            again = copy.deepcopy(pickle.loads(pickle.dumps(result)))
            assert again.center.keys() == {"x", "y", "z"}
            assert again.center["x"].tobytes() == values["x"].tobytes()


def test_arrays_whose_raw_bytes_are_elsewhere_have_no_bytes() -> None:
    assert SameArrays(x=np.zeros((2, 3)).T).bytes is None
    assert SameArrays(x=np.zeros(2, ">f4")).bytes is None
    array = np.arange(2, dtype="<f4")
    assert [part.tobytes() for part in SameArrays(x=array).bytes or ()] == [array.tobytes()]


def test_the_arrays_are_the_same_ones_until_a_tensor_lies_elsewhere() -> None:
    tensors = {"square": torch.nn.Parameter(torch.arange(4.0).reshape(2, 2)), "other": torch.zeros(3)}
    mirror = HostMirror(tensors)
    first = mirror.gather()
    with torch.no_grad():
        tensors["square"].add_(1.0)
    mirror.follow(tensors)
    assert mirror.gather() is first
    assert first["square"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    moves: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: torch.full((2, 2), 7.0),  # other memory
        lambda: tensors["square"].data.t(),  # the same memory and shape, other strides
        lambda: torch.zeros(2, 2).t(),
    )
    for move in moves:
        tensors["square"].data = move()
        mirror.follow(tensors)
        now = mirror.gather()
        assert now is not first
        assert now["square"].tolist() == tensors["square"].tolist()
        mirror.scatter(SameArrays(square=np.array([[1, 2], [3, 4]], np.float32), other=np.ones(3, np.float32)))
        assert tensors["square"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_arrays_that_are_the_same_are_written_as_others_are(dtype: torch.dtype) -> None:
    shapes = {"large": (70_000,), "small": (3, 5), "scalar": (), "empty": (0, 2), "kept": (4,), "strided": (5, 3)}
    values = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    given = HostMirror(values).gather()
    for arrays in (given, dict(given), given):
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        tensors["strided"] = torch.zeros(3, 5, dtype=dtype).t()
        mirror = HostMirror(tensors)
        for _ in range(2):
            mirror.scatter(arrays, skip={"kept"})
        assert not tensors.pop("kept").any()
        assert all(torch.equal(tensor, values[name]) for name, tensor in tensors.items())


def test_same_arrays_of_another_type_or_order_are_written_by_name() -> None:
    tensors = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(2, dtype=torch.float16)}
    mirror = HostMirror(tensors)
    in_another_order = SameArrays(b=np.full(2, 2, np.float16), a=np.full(2, 1, np.float16))
    of_another_type = SameArrays(a=np.full(2, 3, np.float16), b=np.full(2, 4, ml_dtypes.bfloat16))
    for arrays, a, b in ((in_another_order, 1.0, 2.0), (of_another_type, 3.0, 4.0)):
        mirror.scatter(arrays)
        assert (tensors["a"].tolist(), tensors["b"].tolist()) == ([a, a], [b, b])


def test_a_getter_finds_what_a_module_has_replaced() -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    getter(model)
    names = list(getter.variables())
    assert getter.tensors(names) == getter.tensors(names)
    model[1].running_mean = torch.ones(2)
    assert getter.tensors(names)["1.running_mean"] is model.get_buffer("1.running_mean")
    model[0] = torch.nn.Linear(2, 2)
    found = getter.tensors(names)
    assert found["0.weight"] is model.get_parameter("0.weight")
    assert found["0.bias"] is model.get_parameter("0.bias")
    assert list(getter.tensors(names[1:])) == names[1:]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda getter: pickle.loads(pickle.dumps(getter))])
def test_a_copy_of_a_getter_looks_at_its_own_model(copied: Callable[[Any], ModelAverageCustomGetter]) -> None:
    getter = ModelAverageCustomGetter("cpu")
    getter(torch.nn.Linear(2, 2))
    names = list(getter.variables())
    getter.tensors(names)
    other = copied(getter)
    other.model.bias = torch.nn.Parameter(torch.ones(2))
    assert other.tensors(names)["bias"].tolist() == [1.0, 1.0]
    assert getter.tensors(names)["bias"] is getter.model.get_parameter("bias")


def test_places_keep_no_module_and_no_tensor_alive() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    places = TensorPlaces(model, {"0.weight": model.get_parameter("0.weight")})
    assert places.are_same()
    gone: list[weakref.ref[Any]] = [weakref.ref(model[1]), weakref.ref(model.get_parameter("1.weight"))]
    model[1] = torch.nn.Linear(2, 2)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not places.are_same()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_getter_finds_what_a_compiled_module_has_replaced() -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    getter(model)
    names = list(getter.variables())
    before = getter.tensors(names)
    assert getter.tensors(names) == before
    model[0].weight = torch.nn.Parameter(torch.ones(2, 2))
    now = getter.tensors(names)
    assert now["0.weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert now["0.bias"] is before["0.bias"]


def test_a_tensor_that_no_module_holds_is_looked_for_every_time() -> None:
    model = torch.nn.Linear(2, 2)
    assert not TensorPlaces(model, {"elsewhere": torch.zeros(2)}).are_same()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "inline"])
def test_arrays_that_are_pushed_again_are_pushed_with_their_present_values(
    start_server: StartServer, shared: bool
) -> None:
    x, y = np.zeros(50_000, np.float32), np.zeros(3, np.float16)
    same = SameArrays(x=x, y=y)
    with ParameterServerSession(
        [start_server(1, shared=shared).address], worker_id="a", is_chief=True, shared_memory=shared
    ) as session:
        session.initialize(same)
        centers = []
        for value in range(1, 5):
            x[:], y[:] = value, -value
            result = session.push_and_average(same, copy=False)
            center = result.center
            centers.append(result.lent)
            assert (set(center["x"].tolist()), set(center["y"].tolist())) == ({float(value)}, {-float(value)})
            assert not center["x"].flags.writeable
        # What lies in the same memory is the same dictionary.
        assert len({id(center) for center in centers}) <= 2
        # In another order, and as a center that was not copied, they are values like any other.
        assert session.push_and_average({"y": y + 1, "x": x}).center["y"].tolist() == [-3.0] * 3
        last = session.push_and_average({"y": y, "x": x}, copy=False).center
        assert session.push_and_average(last).center["x"].tolist() == x.tolist()
