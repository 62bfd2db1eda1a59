"""A wrapper that averages gradients makes rounds useless: the log says so once, and in no other case."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
from ma_client.torch.gradient_sync import warn_if_gradients_are_shared
from ma_client.torch.local_variables import LocalVariables
from ma_client.torch.role import role_of
from modelaverage.logs import EVENTS
from tests.conftest import StartServer

PROCESSES = 4


@contextlib.contextmanager
def process_group(size: int) -> Iterator[None]:
    """A process group as one of ``size`` processes sees it; nothing is really exchanged."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def in_a_process_group() -> Iterator[None]:
    with process_group(PROCESSES):
        yield


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "modelaverage_event", "") == "gradients_shared"]


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))


class Composed(torch.nn.Module):
    """A model of which only a part is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.body = DistributedDataParallel(net())


class OfAFramework(DistributedDataParallel):
    """A subclass, as frameworks have one."""


@pytest.mark.usefixtures("in_a_process_group")
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, OfAFramework])
def test_a_model_that_is_wrapped_is_warned_about_once(
    wrapper: type[DistributedDataParallel], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    wrapped = wrapper(model)
    for given in (model, model, wrapped):  # the getter may have been given either
        warn_if_gradients_are_shared(given)
    first, second = warnings_of(caplog)
    for record in (first, second):
        fields = record.__dict__["modelaverage_fields"]
        assert tuple(fields) == EVENTS["gradients_shared"]
        assert fields == {"wrapper": wrapper.__name__, "processes": PROCESSES}
        assert record.levelno == logging.WARNING
        for named in (wrapper.__name__, "4 processes", "ma-launch", "docs/trainers.md"):
            assert named in record.getMessage()


@pytest.mark.usefixtures("in_a_process_group")
def test_a_part_that_is_wrapped_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_gradients_are_shared(Composed())
    assert len(warnings_of(caplog)) == 1


@pytest.mark.usefixtures("in_a_process_group")
def test_the_wrapper_of_another_model_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    other = DistributedDataParallel(net())
    warn_if_gradients_are_shared(net())
    assert warnings_of(caplog) == []
    del other


@pytest.mark.usefixtures("in_a_process_group")
def test_a_process_group_alone_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_gradients_are_shared(net())
    assert warnings_of(caplog) == []


@pytest.mark.usefixtures("in_a_process_group")
def test_a_wrapper_that_synchronizes_nothing_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        warn_if_gradients_are_shared(model)
    assert warnings_of(caplog) == []
    warn_if_gradients_are_shared(model)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.usefixtures("in_a_process_group")
def test_a_wrapper_among_the_ranks_of_one_worker_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    wrapped = DistributedDataParallel(model)
    getter = ModelAverageCustomGetter(worker_device="cpu")
    getter(model)
    role = role_of(torch.distributed.group.WORLD)
    LocalVariables(getter, True, role.mirror, role.ranks).warn_if_gradients_are_shared()
    assert warnings_of(caplog) == []
    del wrapped


@pytest.mark.usefixtures("in_a_process_group")
def test_a_wrapper_around_the_ranks_of_several_workers_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    wrapped = DistributedDataParallel(model)
    own = role_of(torch.distributed.new_group([0, 1])).ranks
    warn_if_gradients_are_shared(model, own)
    (said,) = warnings_of(caplog)
    assert said.__dict__["modelaverage_fields"]["processes"] == PROCESSES
    assert "process_group" in said.getMessage()
    del wrapped


def test_one_process_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    with process_group(1):
        model = net()
        wrapped = DistributedDataParallel(model)
        warn_if_gradients_are_shared(model)
    assert warnings_of(caplog) == []
    del wrapped


def test_without_a_process_group_nothing_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    with process_group(PROCESSES):
        model = net()
        wrapped = DistributedDataParallel(model)
    warn_if_gradients_are_shared(model)
    assert warnings_of(caplog) == []
    del wrapped


@pytest.mark.usefixtures("in_a_process_group")
@pytest.mark.parametrize("wrapped_before_the_hook", [True, False])
def test_the_optimizer_warns_at_its_start_or_at_the_first_round(
    wrapped_before_the_hook: bool, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = ClusterSpec((start_server(1).address,), 1, 0)
    getter = ModelAverageCustomGetter(worker_device="cpu")
    model = getter(net())
    wrapped = DistributedDataParallel(model) if wrapped_before_the_hook else None
    with ParameterServerSession(cluster.ps_hosts, worker_id="worker-0", is_chief=True) as session:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ModelAverageOptimizer(inner, 1, True, getter, 1, session=session)
        with optimizer.make_session_run_hook():
            assert len(warnings_of(caplog)) == wrapped_before_the_hook
            wrapped = wrapped or DistributedDataParallel(model)
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
    assert len(warnings_of(caplog)) == 1


def test_the_page_that_the_warning_names_is_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert re.search(r"^## .*torchrun", page, re.MULTILINE)
