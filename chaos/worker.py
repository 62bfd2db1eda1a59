"""A worker of the run: the digits, trained as `ps_worker.demo.digits` does it, by a process that may be killed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from chaos.log import Values, WorkerLog, flat
from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession, PushResult
from ma_client.transports.data_settings import DATA_SETTINGS, DataSettings
from modelaverage.chosen import NO_COMPRESSION
from modelaverage.outer import AVERAGE, OuterOptimizer
from ps_worker.demo.digits import DigitsData, DigitsNet, Images, accuracy
from ps_worker.demo.digits_config import DigitsConfig

__all__ = ["FRAGMENT_SIZE_BYTES", "NO_COMPRESSION", "WAYS", "Task", "Way", "accuracy_of", "warm_up", "work"]

Way = Literal["shared memory", "data connection", "messages"]
WAYS: tuple[Way, ...] = ("shared memory", "data connection", "messages")

# Ten fragments, so that a push can break off in the middle.
FRAGMENT_SIZE_BYTES = 4096
# Short intervals, so that much of the time goes into rounds.
_CONFIG = DigitsConfig(interval_steps=5)


@dataclass(frozen=True)
class Task:
    """The settings of a worker's process.

    Args:
        cluster: the server, and which worker this is.
        process: the number of this process among those of the worker, from 1.
        rounds: the `global_step` at which the worker is done.
        log: the directory of the run's log.
        way: the transport of its bytes; None: the session's choice.
        outer: the outer optimizer that the chief names.
        compression: the codec that it names.
    """

    cluster: ClusterSpec
    process: int
    rounds: int
    log: Path
    way: Way | None = None
    outer: OuterOptimizer = AVERAGE
    compression: str = NO_COMPRESSION


def work(task: Task) -> None:
    """The process: pulls the center and goes on from it until the planned `global_step`."""
    cluster = task.cluster
    logging.basicConfig(format=f"%(asctime)s process {task.process}: %(message)s", level=logging.INFO)
    log = WorkerLog(task.log, cluster.worker_id, task.process)
    logging.getLogger("ma_client").addHandler(_TriedAgainHandler(log))
    logging.info("begins")
    order = _Order(_digits().part(cluster.num_workers, cluster.task_index, _CONFIG.batch_size), cluster)
    with _LoggedSession(cluster, log, task.way) as session:
        getter = ModelAverageCustomGetter(worker_device="cpu")
        model = getter(_initial_model())
        optimizer = ModelAverageOptimizer(
            _local_optimizer(model),
            num_worker=cluster.num_workers,
            is_chief=cluster.is_chief,
            ma_custom_getter=getter,
            interval_steps=_CONFIG.interval_steps,
            session=session,
            outer_optimizer=task.outer,
            compression=task.compression,
        )
        with optimizer.make_session_run_hook():
            while optimizer.global_step < task.rounds:
                for batch in order.interval(optimizer.global_step):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(batch.pixels), batch.digits)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()


def warm_up() -> None:
    """Does what takes long and is the same for all workers, in the process that they are forked from."""
    torch.set_num_threads(1)
    _digits()
    _local_optimizer(_initial_model())  # the first one of a process imports half of torch


def accuracy_of(center: Values) -> float:
    """The share (0 to 1) of the test images that a center classifies correctly."""
    model, start = DigitsNet(), 0
    state = model.state_dict()
    for name in sorted(state):  # as `flat` orders them
        count = state[name].numel()
        state[name].copy_(torch.from_numpy(center[start : start + count].copy()).reshape(state[name].shape))
        start += count
    assert start == center.size
    return accuracy(model, _digits().test)


class _Order:
    """The batches of every interval, which are the same for every process."""

    def __init__(self, part: Images, cluster: ClusterSpec) -> None:
        self._part = part
        self._seed = 1000 * _CONFIG.seed + cluster.task_index
        self._batches: Iterator[Images] = iter(())
        self._next: int | None = None

    def interval(self, base_step: int) -> Iterator[Images]:
        """The batches with which the center of ``base_step`` is trained on."""
        if self._next != base_step:
            order = torch.Generator().manual_seed(self._seed)
            skipped = base_step * _CONFIG.interval_steps
            self._batches = itertools.islice(self._part.batches(_CONFIG.batch_size, order), skipped, None)
        self._next = base_step + 1
        return itertools.islice(self._batches, _CONFIG.interval_steps)


class _LoggedSession(ParameterServerSession):
    """A session that logs every push before it makes it, and every center that it receives."""

    def __init__(self, cluster: ClusterSpec, log: WorkerLog, way: str | None) -> None:
        self._log = log
        self._pushes = 0
        super().__init__(
            cluster.ps_hosts,
            worker_id=cluster.worker_id,
            is_chief=cluster.is_chief,
            fragment_size_bytes=FRAGMENT_SIZE_BYTES,
            shared_memory=way in (None, "shared memory"),
            data_connections=DataSettings(least_bytes=0) if way == "data connection" else DATA_SETTINGS,
        )

    def pull(self, *args: Any, **kwargs: Any) -> tuple[Mapping[str, NDArray[Any]], int]:
        center, step = super().pull(*args, **kwargs)
        self._log.pulled(step, flat(center))
        return center, step

    def push_and_average(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> PushResult:
        assert self.base_step is not None
        assert not kwargs.get("untouched"), "all of the digits' parameters have gradients"
        self._pushes += 1
        self._log.pushing(self._pushes, self.base_step, flat({n: np.asarray(v) for n, v in variables.items()}))
        result = super().push_and_average(variables, *args, **kwargs)
        self._log.answered(
            self._pushes, result.outcome.name, result.global_step, result.contributors, flat(result.center)
        )
        return result


class _TriedAgainHandler(logging.Handler):
    def __init__(self, log: WorkerLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "trying again" in message:
            self._log.tried_again(message)


@cache
def _digits() -> DigitsData:
    return DigitsData.load()


def _initial_model() -> DigitsNet:
    torch.manual_seed(_CONFIG.seed)
    return DigitsNet()


def _local_optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=_CONFIG.learning_rate, momentum=_CONFIG.momentum)
