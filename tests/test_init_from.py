"""The chief's initial values from a file: a whole state dict is accepted, and errors say what is wrong with a file."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file, save_model

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
from ma_client.files.initial_values import read_initial_values
from modelaverage.errors import InvalidRequestError
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer

Arrays = Mapping[str, NDArray[Any]]
StateDict = dict[str, Any]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """log() -> the lines of the client's log."""
    caplog.set_level(logging.INFO, "ma_client")
    return lambda: [record.getMessage() for record in caplog.records]


def read(path: Path, other_names: Mapping[str, Sequence[str]] | None = None, **wanted: Any) -> Arrays:
    """What the file gives for variables like these."""
    like = {name.replace("__", "."): np.zeros_like(value) for name, value in wanted.items()}
    values = read_initial_values(like, path, other_names or {})
    assert list(values) == list(like)
    assert all((values[name].dtype, values[name].shape) == (like[name].dtype, like[name].shape) for name in like)
    return values


def refused(path: Path, message: str, **wanted: Any) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        read(path, **wanted)
    assert str(error.value).startswith(f"cannot initialize from {path}: ")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


def saved(tmp_path: Path, kind: str, state: StateDict) -> Path:
    path = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_file({name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}, path)
    else:
        torch.save(state, path)
    return path


KINDS = ["safetensors", "pt"]
F4 = np.array([1.0, -2.5, 3.0, 0.0], np.float32)


# Whole state dicts, in a whole job.


class Net(torch.nn.Module):
    """Trained, tied and frozen weights, statistics and a counter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, bias=False)
        self.tied = torch.nn.Linear(2, 2, bias=False)
        self.tied.weight = self.layer.weight
        self.frozen = torch.nn.Linear(2, 1, bias=False).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(2)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(value)


AVERAGED = ["layer.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]


def center_from(start_server: StartServer, path: Path) -> Arrays:
    """The center of a job whose chief has this file and a model with other values."""
    address = start_server(1).address
    getter = ModelAverageCustomGetter("cpu")
    model = getter(Net(0.0))
    with ParameterServerSession([address], worker_id="worker-0", is_chief=True, init_from=path) as session:
        opt = ModelAverageOptimizer(torch.optim.SGD(model.parameters()), 1, True, getter, session=session)
        with opt.make_session_run_hook():
            return {name: value.detach().numpy().copy() for name, value in getter.variables().items()}


def assert_all(center: Arrays, value: float) -> None:
    assert list(center) == AVERAGED
    assert all((array == value).all() for array in center.values())


@pytest.mark.parametrize("kind", ["pt", "pth"])
def test_what_torch_saved_of_a_model_initializes_its_center(
    start_server: StartServer, tmp_path: Path, kind: str, log: Callable[[], list[str]]
) -> None:
    path = saved(tmp_path, kind, Net(3.0).state_dict())
    assert_all(center_from(start_server, path), 3.0)
    (line,) = (line for line in log() if str(path) in line)
    assert line == (
        f"{path} has values that are not in the center; they are not used (what is not averaged stays as each worker "
        "made it): frozen.weight, norm.num_batches_tracked"
    )


def test_what_torch_saved_in_its_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.tensor(F4)}, path, _use_new_zipfile_serialization=False)
    assert np.array_equal(read(path, w=F4)["w"], F4)


def test_a_safetensors_file_may_have_a_tied_weight_under_either_name(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(Net(3.0), str(path))
    assert_all(center_from(start_server, path), 3.0)
    state = Net(3.0).state_dict()
    for name in ("layer.weight", "tied.weight"):
        path = saved(tmp_path, "safetensors", {key: value for key, value in state.items() if key != name})
        assert_all(center_from(start_server, path), 3.0)


def test_a_whole_state_dict_in_bfloat16_initializes_a_center_in_float32(
    start_server: StartServer, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    path = saved(tmp_path, "safetensors", Net(3.0).to(torch.bfloat16).state_dict())
    assert_all(center_from(start_server, path), 3.0)
    names = ", ".join(f"{name} (bfloat16 to float32)" for name in AVERAGED[:4])
    assert f"{path}: converted {names} and 1 more" in log()


def test_a_file_that_lacks_a_variable_initializes_nothing(start_server: StartServer, tmp_path: Path) -> None:
    address = start_server(1).address
    path = saved(tmp_path, "safetensors", {"w": torch.zeros(2)})
    with ParameterServerSession([address], worker_id="a", is_chief=True, init_from=path) as session:
        with pytest.raises(InvalidRequestError, match=r"model.safetensors: it lacks b; it has w"):
            session.initialize({"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
        assert session.status().phase == pb.PHASE_UNINITIALIZED


# Names.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        ("a.weight", "b.weight"),
        ("module.a.weight", "module.b.weight"),
        ("_orig_mod.a.weight", "_orig_mod.b.weight"),
        ("module._orig_mod.a.weight", "module._orig_mod.b.weight"),
        ("_orig_mod.module.a.weight", "_orig_mod.module.b.weight"),
        ("a._orig_mod.weight", "b.weight"),
        ("a.module.weight", "b.module._orig_mod.weight"),
    ],
)
def test_what_wrappers_add_to_names_makes_no_difference(tmp_path: Path, kind: str, names: tuple[str, str]) -> None:
    first, second = names
    path = saved(tmp_path, kind, {first: torch.tensor(F4), second: torch.tensor(F4 + 1)})
    values = read(path, a__weight=F4, b__weight=F4)
    assert np.array_equal(values["a.weight"], F4)
    assert np.array_equal(values["b.weight"], F4 + 1)


def test_a_models_own_module_is_read_under_its_own_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.tensor(F4), "weight": torch.tensor(F4 + 1)}
    path = saved(tmp_path, "safetensors", state)
    values = read(path, module__weight=F4, weight=F4)
    assert (values["module.weight"][0], values["weight"][0]) == (F4[0], F4[0] + 1)
    wrapped = saved(tmp_path, "pt", {f"module.{name}": value for name, value in state.items()})
    values = read(wrapped, module__weight=F4, weight=F4)
    assert (values["module.weight"][0], values["weight"][0]) == (F4[0], F4[0] + 1)


def test_other_names_are_taken_where_the_own_one_is_missing(tmp_path: Path) -> None:
    path = saved(tmp_path, "safetensors", {"module.head": torch.tensor(F4)})
    assert np.array_equal(read(path, {"embedding": ["head"]}, embedding=F4)["embedding"], F4)


def test_of_several_names_the_own_one_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, "safetensors", {"head": torch.tensor(F4 + 1), "embedding": torch.tensor(F4)})
    assert np.array_equal(read(path, {"embedding": ["head"]}, embedding=F4)["embedding"], F4)


# Element types.

DTYPES = {
    "float64": (np.float64, torch.float64),
    "float32": (np.float32, torch.float32),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", DTYPES)
@pytest.mark.parametrize("here", DTYPES)
def test_every_float_type_is_converted_to_every_other(
    tmp_path: Path, kind: str, there: str, here: str, log: Callable[[], list[str]]
) -> None:
    path = saved(tmp_path, kind, {"w": torch.tensor([1.5, -2.0, float("inf")], dtype=DTYPES[there][1])})
    values = read(path, w=np.zeros(3, DTYPES[here][0]))
    assert values["w"].tolist() == [1.5, -2.0, float("inf")]
    assert log() == ([] if here == there else [f"{path}: converted w ({there} to {here})"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_too_large_for_the_centers_type_is_refused(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind, {"w": torch.tensor([1.0, 70000.0])})
    refused(path, "variable 'w' has the value 70000.0, which does not fit float16", w=np.zeros(2, np.float16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)
)
def test_what_is_no_floating_point_number_is_refused_for_a_variable_and_passed_over_otherwise(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = saved(tmp_path, kind, {"w": torch.zeros(4).to(dtype), "other": torch.tensor(F4)})
    refused(path, "variable 'w' is .* in the file, and float32 in the model", w=F4)
    assert np.array_equal(read(path, other=F4)["other"], F4)


# What is refused.


@pytest.mark.parametrize("kind", KINDS)
def test_another_shape_is_refused_with_both(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind, {"module.w": torch.zeros(2, 3)})
    refused(path, r"variable 'module.w' has shape \[2, 3\] there and \[3, 2\] here", w=np.zeros((3, 2), np.float32))
    refused(path, r"has shape \[2, 3\] there and \[\] here", w=np.float32(0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_named_beside_what_there_is(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind, {f"layer.{number}": torch.zeros(1) for number in range(9)})
    refused(path, "it lacks w, v; it has layer.0, layer.1, layer.2, layer.3 and 5 more", w=F4, layer__1=F4[:1], v=F4)


NO_SAFETENSORS = "it is not a safetensors file .*`ps-server export` writes the former"
FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.safetensors", None, "No such file"),
    "empty": ("a.safetensors", b"", "the file is empty"),
    "short": ("a.safetensors", b"1234", NO_SAFETENSORS),
    "text": ("a.safetensors", b'{"weight_map": {}}  and more of it', NO_SAFETENSORS),
    "a header without end": ("a.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", NO_SAFETENSORS),
    "a zip file": ("a.pt", b"PK\x03\x04 and nothing else", "torch.load with weights_only=True cannot read it"),
    "a pickle": ("a.pt", b"\x80\x04N.", "torch.load with weights_only=True cannot read it"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_none_of_the_kind_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(path, message, w=F4)


def test_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, "Is a directory", w=F4)


class Hostile:
    """Does something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": torch.zeros(4)}, "epoch": 3}, "it has model instead of a state dict; save model.state_dict"),
        ([torch.zeros(4)], "it has a list instead of a state dict"),
        (Hostile(), "torch.load with weights_only=True cannot read it .*save model.state_dict"),
    ],
    ids=["a checkpoint of a training", "a list", "code"],
)
def test_what_torch_saved_and_is_no_state_dict_is_refused(
    tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    refused(path, message, w=F4)
    assert capsys.readouterr().out == ""


# Without torch.

WITHOUT_TORCH = """\
import sys
sys.modules["torch"] = None  # as if it were not installed
import ml_dtypes, numpy as np
from ma_client.files.initial_values import read_initial_values
from modelaverage.errors import InvalidRequestError
values = read_initial_values({"w": np.zeros(2, ml_dtypes.bfloat16), "v": np.zeros(2, np.float32)}, sys.argv[1], {})
print(values["w"].dtype, values["w"].tolist(), values["v"].dtype, values["v"].tolist())
try:
    read_initial_values({"w": np.zeros(2, np.float32)}, sys.argv[2], {})
except InvalidRequestError as error:
    print(error)
"""


def test_bfloat16_is_read_without_torch_and_what_torch_saved_says_what_to_do(tmp_path: Path) -> None:
    brain = np.array([1.5, 2.0]).astype(ml_dtypes.bfloat16)
    path, torchs = tmp_path / "model.safetensors", saved(tmp_path, "pt", {"w": torch.zeros(2)})
    save_arrays({"w": brain, "v": brain, "steps": np.array(3)}, path)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(path), str(torchs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    values, message = done.stdout.splitlines()
    assert values == "bfloat16 [1.5, 2.0] float32 [1.5, 2.0]"
    assert message.startswith(f"cannot initialize from {torchs}: torch.save wrote it, and torch is needed to read it")
