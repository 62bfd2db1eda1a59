"""Workers in a job, for the tests of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
from tests.conftest import RunningServer, StartServer
from tests.optimizer.workers import Join, Net, Worker, sgd


@pytest.fixture
def join() -> Iterator[Join]:
    """join(server, model, index=..., num_worker=..., ...) -> a worker that is in the job but has not started."""
    with ExitStack() as sessions:

        def join_job(
            server: RunningServer,
            model: torch.nn.Module | None = None,
            *,
            index: int = 0,
            num_worker: int = 1,
            local: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer] = sgd,
            session_class: type[ParameterServerSession] = ParameterServerSession,
            average_buffers: bool = True,
            worker_device: str = "cpu",
            also_average: Iterable[str] = (),
            **options: Any,
        ) -> Worker:
            session = session_class([server.address], worker_id=f"worker-{index}", is_chief=index == 0)
            sessions.enter_context(session)
            getter = ModelAverageCustomGetter(worker_device, average_buffers, also_average=also_average)
            averaged = getter(Net() if model is None else model)
            inner = local(averaged.parameters())
            settings = {"interval_steps": 1, **options}
            opt = ModelAverageOptimizer(inner, num_worker, index == 0, getter, session=session, **settings)
            return Worker(session, averaged, inner, opt)

        yield join_job


@pytest.fixture
def alone(start_server: StartServer, join: Join) -> Join:
    """alone(model, ...) -> the started worker of a job of one."""

    def start_alone(model: torch.nn.Module | None = None, **options: Any) -> Worker:
        worker = join(start_server(1), model, **options)
        worker.start()
        return worker

    return start_alone
