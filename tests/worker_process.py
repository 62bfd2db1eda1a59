"""A worker as a separate process, which a test gives commands and can kill at a known moment.

The process is this module as a script. It reads commands from its standard input, one JSON object a line, calls the
method of that name, and answers each with one line: ``{"result": ...}`` or ``{"error": [exception, reason, message]}``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ma_client import ParameterServerSession, PushResult
from modelaverage import wire
from modelaverage.errors import ModelAverageError
from tests.prepared import Prepared

if TYPE_CHECKING:
    import torch

    from ma_client import ModelAverageOptimizer

__all__ = [
    "START_TIMEOUT_S",
    "TIMEOUT_S",
    "Model",
    "Process",
    "Pushed",
    "TorchWorkerProcess",
    "WorkerError",
    "WorkerProcess",
    "ramp",
]

# The longest wait: only a test that fails waits this long.
TIMEOUT_S = 20.0
# On a busy machine, it takes long to import torch.
START_TIMEOUT_S = 120.0
Model = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, Sequence[int]]


def ramp(value: float, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """``value`` times 1, 2, 3 ..., so that a misplaced element shows."""
    return {
        name: np.float32(value) * np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }


# The test's side.


@dataclass(frozen=True)
class Pushed:
    """How a push of a worker ended."""

    outcome: str
    global_step: int
    center: Model
    contributors: list[str]


class WorkerError(Exception):
    """Raised for an exception in the worker's call."""

    def __init__(self, kind: str, reason: str | None, message: str) -> None:
        super().__init__(message)
        self.kind, self.reason = kind, reason


class Process:
    """A process that runs a module, and whose output is kept. Every wait for it is bounded."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = Prepared(module, *arguments, pipes=True, warnings_are_errors=True)
        self._out: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors = list[str]()
        self._more_errors = threading.Condition()
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_out, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def errors(self) -> str:
        """Its stderr so far."""
        with self._more_errors:
            return "".join(self._errors)

    def forget_errors(self) -> None:
        """Has later searches ignore what is on stderr so far."""
        with self._more_errors:
            self._errors.clear()

    @property
    def runs(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def line(self, timeout_s: float = TIMEOUT_S) -> str:
        """The next line of its standard output."""
        try:
            line = self._out.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"it did not say anything; stderr: {self.errors}") from None
        assert line, f"it ended instead of saying anything; stderr: {self.errors}"
        return line

    def logged(self, text: str) -> str:
        """Waits for a line with ``text`` on stderr, and returns it."""

        def found() -> str:
            return next((line for line in self._errors if text in line), "")

        with self._more_errors:
            line = self._more_errors.wait_for(found, TIMEOUT_S)
            assert line, f"{text!r} is not in: {''.join(self._errors)}"
            return line

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self.end()

    def end(self) -> int:
        """Closes its standard input and waits for its end; returns its exit code."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        return code

    def write(self, line: str) -> None:
        """Writes a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read_out(self, pipe: IO[str]) -> None:
        with pipe:
            for line in itertools.chain(pipe, [""]):
                self._out.put(line)

    def _read_errors(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                with self._more_errors:
                    self._errors.append(line)
                    self._more_errors.notify_all()


class WorkerProcess(Process):
    """A worker; its commands are the methods of `_Worker`.

    The first command has to be `join`; a later `join` makes the process another worker.
    """

    _flags: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__("tests.worker_process", *self._flags)
        self._ready = self._at_work = False

    def get_ready(self) -> None:
        """Waits until it can take a command at once."""
        if not self._ready:
            assert self.line(START_TIMEOUT_S) == "ready\n"
            self._ready = True

    @property
    def idle(self) -> bool:
        """Whether it waits for a command."""
        return self.runs and not self._at_work

    def send(self, command: str, **arguments: Any) -> None:
        """Gives a command; `answer` waits for the answer."""
        assert not self._at_work
        self._at_work = True
        self.write(json.dumps([command, arguments]))

    def answer(self) -> Any:
        """Waits for the answer to a command. Raises WorkerError if the command raised."""
        answer = json.loads(self.line())
        self._at_work = False
        if "error" in answer:
            raise WorkerError(*answer["error"])
        return answer["result"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Gives a command and waits for its answer."""
        self.send(command, **arguments)
        return self.answer()

    def start(self) -> tuple[Model, int]:
        """Joins the job; returns the center that it pulls, and its step."""
        center, step = self.ask("start")
        return _from_json(center), step

    def begin_push(self, by: float = 0.0, hold_after: int | None = None) -> None:
        """Trains, and begins a round."""
        if by:
            self.ask("train", by=by)
        self.send("push", hold_after=hold_after)

    def pushed(self) -> Pushed:
        """Waits for the end of the round."""
        answer = self.answer()
        return Pushed(**{**answer, "center": _from_json(answer["center"])})

    def push(self, by: float = 0.0) -> Pushed:
        """Trains, and makes a round."""
        self.begin_push(by)
        return self.pushed()

    def local(self) -> Model:
        """Its local variables."""
        return _from_json(self.ask("local"))


class TorchWorkerProcess(WorkerProcess):
    """A worker with a model of torch's and an optimizer; its commands are the methods of `_TorchWorker`."""

    _flags = ("--torch",)


def _from_json(model: Mapping[str, Any]) -> Model:
    return {name: np.array(values, np.float32) for name, values in model.items()}


# The worker's side.


def _to_json(model: Model) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.items()}


def _told(result: PushResult) -> dict[str, Any]:
    return {
        "outcome": result.outcome.name,
        "global_step": result.global_step,
        "contributors": list(result.contributors),
    }


def _hold_after(count: int) -> None:
    """Keeps the process from sending more than this many fragments of a push."""
    original = wire.encode_fragment

    def encode(index: int, parts: Iterable[bytes | memoryview]) -> bytes:
        if index == count:
            threading.Event().wait()
        return original(index, parts)

    wire.encode_fragment = encode


class _Worker:
    """A worker whose training is to add a number."""

    def __init__(self) -> None:
        self._session: ParameterServerSession
        self._local: Model
        self._local_step: int
        self._initial_step: int

    def join(
        self, address: str, worker_id: str, initial: float, shapes: Shapes, initial_step: int = 0, **options: Any
    ) -> None:
        """Opens its session, with its own initial values."""
        self._session = ParameterServerSession([address], worker_id=worker_id, **options)
        self._local, self._local_step, self._initial_step = ramp(initial, shapes), 0, initial_step

    def start(self) -> tuple[dict[str, Any], int]:
        """Initializes the center if it is the chief; continues from the center."""
        if self._session.is_chief:
            self._session.initialize(self._local, self._initial_step)
        center, step = self._session.pull(expected=self._local)
        self._local = center
        return _to_json(center), step

    def train(self, by: float) -> None:
        """One local step."""
        added = ramp(by, {name: value.shape for name, value in self._local.items()})
        self._local = {name: value + added[name] for name, value in self._local.items()}
        self._local_step += 1

    def push(self, hold_after: int | None = None) -> dict[str, Any]:
        """Makes a round; with ``hold_after`` only that many fragments of its push ever leave the process."""
        if hold_after is not None:
            _hold_after(hold_after)
        result = self._session.push_and_average(self._local, local_step=self._local_step)
        self._local = result.center
        return {**_told(result), "center": _to_json(result.center)}

    def reshape(self, name: str, shape: Sequence[int]) -> None:
        """Gives one of its local variables another shape."""
        self._local = {**self._local, name: np.zeros(shape, np.float32)}

    def local(self) -> dict[str, Any]:
        """The local variables."""
        return _to_json(self._local)

    def close(self) -> None:
        """Says goodbye."""
        self._session.close()


class _TorchWorker:
    """A worker with a model of torch's and a `ModelAverageOptimizer`."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # the rest of torch is only now imported
        self._session: ParameterServerSession
        self._opt: ModelAverageOptimizer
        self._model: torch.nn.Module

    def join(
        self,
        address: str,
        worker_id: str,
        is_chief: bool,
        initial: Mapping[str, list[float]],
        num_worker: int,
        optimizer: str = "SGD",
        settings: Mapping[str, Any] = MappingProxyType({"lr": 1.0}),
        interval_steps: int = 1,
    ) -> None:
        """Makes a model, an optimizer of torch's, and the averaging optimizer around it."""
        import torch

        from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer

        model = torch.nn.Module()
        for name, values in initial.items():
            model.register_parameter(name, torch.nn.Parameter(torch.tensor(values)))
        getter = ModelAverageCustomGetter(worker_device="cpu")
        self._model = getter(model)
        local = getattr(torch.optim, optimizer)(self._model.parameters(), **settings)
        self._session = ParameterServerSession([address], worker_id=worker_id, is_chief=is_chief)
        self._opt = ModelAverageOptimizer(local, num_worker, is_chief, getter, interval_steps, session=self._session)

    def start(self) -> None:
        """Does what ``with opt.make_session_run_hook():`` does first."""
        self._opt.make_session_run_hook().after_create_session()

    def step(self, **gradients: list[float]) -> dict[str, Any] | None:
        """One local step, perhaps with a round; parameters that are not named have a gradient of None."""
        import torch

        for name, parameter in self._model.named_parameters():
            parameter.grad = torch.tensor(gradients[name]) if name in gradients else None
        self._opt.step()
        return None if self._opt.last_round is None else _told(self._opt.last_round)

    def assign(self, **values: list[float]) -> None:
        """Sets local variables."""
        import torch

        with torch.no_grad():
            for name, value in values.items():
                self._model.get_parameter(name).copy_(torch.tensor(value))

    def state(self) -> dict[str, Any]:
        """All that it has."""
        parameters = dict(self._model.named_parameters())
        return {
            "values": _to_json({name: parameter.detach().numpy() for name, parameter in parameters.items()}),
            "slots": {
                name: {slot: self._opt.get_slot(parameter, slot).tolist() for slot in self._opt.get_slot_names()}
                for name, parameter in parameters.items()
            },
            "local_step": self._opt.local_step,
            "global_step": self._opt.global_step,
        }

    def close(self) -> None:
        """Says goodbye."""
        self._session.close()


def _obey(worker: object) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"result": getattr(worker, command)(**arguments)}
        except ModelAverageError as error:
            reason = None if error.reason is None else error.reason.name
            answer = {"error": [type(error).__name__, reason, str(error)]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _obey(_TorchWorker() if "--torch" in sys.argv else _Worker())
