"""The cluster in the environment, and the file that a chief initializes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from ma_client import ClusterError, ClusterSpec, ParameterServerSession
from modelaverage.errors import InvalidRequestError
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.recorded import without_a_cluster

pytestmark = pytest.mark.in_memory

ENVIRONMENT = {"MA_PS_HOSTS": "10.0.0.1:2222", "MA_NUM_WORKERS": "2", "MA_TASK_INDEX": "1"}


def test_a_cluster_survives_the_way_through_the_environment() -> None:
    cluster = ClusterSpec(("10.0.0.1:2222", "[::1]:2223"), num_workers=3, task_index=2)
    environment = cluster.to_env()
    assert all(isinstance(value, str) for value in environment.values())
    assert ClusterSpec.from_env(environment) == cluster
    assert ClusterSpec.from_env({**environment, "PATH": "/bin"}) == cluster


def test_the_file_to_initialize_from_travels_in_the_environment() -> None:
    cluster = ClusterSpec(("10.0.0.1:2222",), 2, 0, init_from="center.safetensors")
    assert ClusterSpec.from_env(cluster.to_env()) == cluster


@pytest.mark.parametrize(("task_index", "chief"), [(0, True), (1, False)])
def test_task_0_is_the_chief(task_index: int, chief: bool) -> None:
    cluster = ClusterSpec(("10.0.0.1:2222",), 2, task_index)
    assert (cluster.worker_id, cluster.is_chief) == (f"worker-{task_index}", chief)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_missing_variable_is_named(name: str) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != name}
    with pytest.raises(ClusterError, match=name) as refused:
        ClusterSpec.from_env(environment)
    assert not any(other in str(refused.value) for other in environment)


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(ClusterError, match="MA_PS_HOSTS, MA_NUM_WORKERS, MA_TASK_INDEX"):
        ClusterSpec.from_env({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MA_PS_HOSTS", ""),
        ("MA_PS_HOSTS", "10.0.0.1:2222,"),
        ("MA_NUM_WORKERS", "two"),
        ("MA_NUM_WORKERS", "0"),
        ("MA_NUM_WORKERS", ""),
        ("MA_TASK_INDEX", "1.0"),
        ("MA_TASK_INDEX", "-1"),
        ("MA_TASK_INDEX", "2"),
    ],
)
def test_an_unusable_variable_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ClusterError) as refused:
        ClusterSpec.from_env({**ENVIRONMENT, name: value})
    message = str(refused.value)
    assert name in message
    assert value in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("cluster", "named"),
    [
        (((), 1, 0), "ps_hosts"),
        ((("",), 1, 0), "ps_hosts"),
        ((("h:1",), 0, 0), "num_workers 0"),
        ((("h:1",), 2, 2), "task_index 2 is not from 0 to 1"),
        ((("h:1",), 2, -1), "task_index -1"),
    ],
)
def test_a_cluster_that_contradicts_itself_is_refused(cluster: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ClusterError, match=named):
        ClusterSpec(*cluster)


def test_a_session_reads_the_environment(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    address = start_server(1).address
    for name, value in ClusterSpec((address,), num_workers=2, task_index=0).to_env().items():
        monkeypatch.setenv(name, value)
    with ParameterServerSession.from_env() as session:
        assert (session.worker_id, session.is_chief) == ("worker-0", True)
        session.initialize({"w": np.arange(3.0)})
    with ParameterServerSession.from_env(worker_id="evaluator", is_chief=False) as session:
        assert (session.worker_id, session.is_chief) == ("evaluator", False)
        assert np.array_equal(session.pull()[0]["w"], [0, 1, 2])


def test_a_session_without_an_environment_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_a_cluster(os.environ).keys():
        monkeypatch.delenv(name)
    with pytest.raises(ClusterError, match="MA_PS_HOSTS"):
        ParameterServerSession.from_env()


# The file.


def test_a_chief_may_initialize_from_a_file(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "center.safetensors"
    kept = {"b": np.full(3, 7, ml_dtypes.bfloat16), "w": np.arange(4, dtype=np.float32)}
    save_file(kept, file)
    server = start_server(1)
    with ParameterServerSession([server.address], worker_id="a", is_chief=True, init_from=file) as session:
        session.initialize({"w": np.zeros(4, np.float32), "b": np.zeros(3, ml_dtypes.bfloat16)})
        center, _ = session.pull()
    assert list(center) == ["w", "b"]
    assert all(np.array_equal(center[name], value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b"not a safetensors file", "cannot initialize from"),
        (
            save({"w": np.zeros(5, np.float32)}),
            r"center.safetensors: variable 'w' has shape \[5\] there and \[4\] here",
        ),
        (save({"x": np.zeros(4, np.float32)}), "center.safetensors: it lacks w; it has x"),
    ],
)
def test_a_file_that_does_not_fit_initializes_nothing(
    start_server: StartServer, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    file = tmp_path / "center.safetensors"
    if content is not None:
        file.write_bytes(content)
    server = start_server(1)
    with ParameterServerSession([server.address], worker_id="a", is_chief=True, init_from=file) as session:
        with pytest.raises(InvalidRequestError, match=complaint):
            session.initialize({"w": np.zeros(4, np.float32)})
        assert session.status().phase == pb.PHASE_UNINITIALIZED
