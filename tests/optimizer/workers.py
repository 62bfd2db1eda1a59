"""Workers with an optimizer, for its tests: one real session each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ma_client import ModelAverageOptimizer, Outcome, ParameterServerSession, PushResult
from tests.conftest import RunningServer

# The longest wait for something that has to happen: only a test that fails waits this long.
TIMEOUT_S = 20.0
# The wait for something that must not happen: a test that passes always waits this long.
QUIET_S = 0.2
T = TypeVar("T")


class Net(torch.nn.Module):
    """Two variables of three elements each."""

    def __init__(self, w: float = 1.0, b: float = 2.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((3,), w))
        self.b = torch.nn.Parameter(torch.full((3,), b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x + self.b


def sgd(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """With rate 1 a step subtracts the gradient: whole numbers stay exact."""
    return torch.optim.SGD(parameters, lr=1.0)


def momentum(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


@dataclass
class Worker:
    """One worker of a job."""

    session: ParameterServerSession
    model: torch.nn.Module
    local: torch.optim.Optimizer
    opt: ModelAverageOptimizer

    def start(self) -> None:
        hook = self.opt.make_session_run_hook()
        hook.begin()
        Running(hook.after_create_session).result()  # which waits for the chief, though not forever in a test

    def give(self, **gradients: float) -> None:
        """Sets these gradients, the same number in every element, and None for the other parameters."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = torch.full_like(parameter, gradients[name]) if name in gradients else None

    def step(self, **gradients: float) -> None:
        self.give(**gradients)
        self.opt.step()

    def values(self) -> dict[str, list[Any]]:
        return {name: parameter.tolist() for name, parameter in self.model.named_parameters()}


Join = Callable[..., Worker]


class Running(Generic[T]):
    """A call on its own thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def finishes_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        assert self.finishes_within(TIMEOUT_S), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._result


def together(*calls: Callable[[], T]) -> list[T]:
    """Makes all calls at once, each on its own thread; returns their results."""
    return [running.result() for running in [Running(call) for call in calls]]


def start_all(workers: Sequence[Worker]) -> None:
    together(*(worker.start for worker in workers))


def outcome(worker: Worker) -> Outcome:
    assert worker.opt.last_round is not None
    return worker.opt.last_round.outcome


def center_of(server: RunningServer) -> Mapping[str, NDArray[np.generic]]:
    with ParameterServerSession([server.address], worker_id="reader") as reader:
        return reader.pull(timeout_s=TIMEOUT_S)[0]


def wait_for_status(server: RunningServer, condition: Callable[[Any], bool]) -> None:
    """Asks the server until its status fulfils the condition."""
    with ParameterServerSession([server.address], worker_id="reader") as reader:
        deadline = threading.Event()
        timer = threading.Timer(TIMEOUT_S, deadline.set)
        timer.start()
        try:
            while not condition(reader.status()):
                assert not deadline.is_set(), "the server never came into this state"
        finally:
            timer.cancel()


class ShortPatience(ParameterServerSession):
    """Gives up at the barrier while ``patience_s`` is set."""

    patience_s: float | None = None

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        return super().push_and_average(variables, weight, **{"timeout_s": self.patience_s, **options})


class Impatient(ParameterServerSession):
    """Gives up when the server is away."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, reconnect_timeout_s=0, **options)


class Overtaken(ParameterServerSession):
    """A session that calls ``meanwhile`` between a push and the reading of its average."""

    meanwhile: Callable[[], None] | None = None

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        result = super().push_and_average(variables, weight, **options)
        if self.meanwhile is not None:
            self.meanwhile()
        return result


class Announced(ParameterServerSession):
    """A session that tells when a push begins and when its answer is there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.push_begins, self.push_is_over = threading.Event(), threading.Event()

    def push_and_average(self, variables: Mapping[str, ArrayLike], weight: float = 1.0, **options: Any) -> PushResult:
        self.push_begins.set()
        result = super().push_and_average(variables, weight, **options)
        self.push_is_over.set()
        return result
