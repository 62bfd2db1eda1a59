"""This optimizer repeats TensorFlow 1.15's ModelAverageOptimizer step by step, with one real client per worker."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
from tests.conftest import StartServer

GOLDEN = Path(__file__).parent / "golden"
ATOL = {"float32": 1e-6, "float64": 1e-12}
# TensorFlow's names for what torch calls ...
SLOTS = {"Momentum": "momentum_buffer", "Adam": "exp_avg", "Adam_1": "exp_avg_sq"}
Gradients = dict[str, NDArray[np.generic] | None]
ADAM_EPSILON = 1e-8
BETA2 = 0.999


def scenario(name: str) -> dict[str, Any]:
    with (GOLDEN / f"{name}.json").open() as file:
        loaded: dict[str, Any] = json.load(file)
    return loaded


class Net(torch.nn.Module):
    def __init__(self, initial: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in initial.items():
            setattr(self, name, torch.nn.Parameter(torch.tensor(value, dtype=dtype)))


class Worker:
    """One worker of a scenario, with its own session, model and optimizer."""

    def __init__(self, config: dict[str, Any], initial: dict[str, Any], index: int, address: str) -> None:
        self.config, self.index = config, index
        self.dtype = torch.float64 if config.get("dtype") == "float64" else torch.float32
        self.session = ParameterServerSession([address], worker_id=f"worker-{index}", is_chief=index == 0)
        self.getter = ModelAverageCustomGetter("cpu")
        self.model = self.getter(Net(initial, self.dtype))
        self.optimizer = ModelAverageOptimizer(
            self._local_optimizer(),
            config["num_worker"],
            index == 0,
            self.getter,
            interval_steps=config["interval"],
            session=self.session,
        )

    def _local_optimizer(self) -> torch.optim.Optimizer:
        opt = self.config["opt"]
        lr = float(np.float32(opt["lr"]))
        if opt["kind"] == "adam":
            return torch.optim.Adam(self.model.parameters(), lr=lr, betas=(0.9, BETA2), eps=ADAM_EPSILON)
        momentum = float(np.float32(opt.get("momentum", 0.0)))
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def start(self, initial: dict[str, Any], trained: set[str]) -> None:
        """Begins with the center, then sets the trained variables to what the original's worker began with. Not the
        others: a variable that is changed without a gradient is averaged here, but the original leaves it alone."""
        hook = self.optimizer.make_session_run_hook()
        hook.begin()
        hook.after_create_session()
        with torch.no_grad():
            for name in trained:
                self.model.get_parameter(name).copy_(torch.tensor(initial[name], dtype=self.dtype))

    def step(self, t: int) -> Gradients:
        """Makes one local step; returns the gradients."""
        self.optimizer.zero_grad()
        grads = self.config["grads"]
        if grads["mode"] == "const":
            for name, parameter in self.model.named_parameters():
                parameter.grad = torch.tensor(grads["g"][self.index][name], dtype=self.dtype)
        else:
            x, y = (torch.tensor(grads[key][self.index], dtype=self.dtype) for key in ("X", "Y"))
            rows = [(t * grads["batch"] + k) % len(x) for k in range(grads["batch"])]
            error = x[rows] @ self.model.get_parameter("w") + self.model.get_parameter("b") - y[rows]
            (0.5 * error.square().sum(dim=1).mean()).backward()  # type: ignore[no-untyped-call]
        used = {n: None if p.grad is None else p.grad.clone().numpy() for n, p in self.model.named_parameters()}
        self.optimizer.step()
        return used


class Replay:
    """All workers of a scenario against one server, compared with the trace after every step."""

    def __init__(self, name: str, start_server: StartServer, shared: bool = False) -> None:
        golden = scenario(name)
        self.config, self.initial, self.trace = golden["config"], golden["initial"], golden["trace"]
        used = [worker["grads_used"] for step in self.trace for worker in step["workers"]]
        self.trained = {name for gradients in used for name, gradient in gradients.items() if gradient is not None}
        self.atol = ATOL[self.config.get("dtype", "float32")]
        self._stack = ExitStack()
        server = start_server(self.config["num_worker"], shared=shared)
        self.reader = self._stack.enter_context(ParameterServerSession([server.address], worker_id="reader"))
        self.workers = [
            Worker(self.config, state["local"], index, server.address)
            for index, state in enumerate(self.initial["workers"])
        ]
        for worker in self.workers:
            self._stack.enter_context(worker.session)
        self._pool = self._stack.enter_context(ThreadPoolExecutor(len(self.workers)))

    def __enter__(self) -> Replay:
        starts = [
            self._pool.submit(worker.start, state["local"], self.trained)
            for worker, state in zip(self.workers, self.initial["workers"], strict=True)
        ]
        for start in starts:
            start.result(timeout=30)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(None, None, None)

    def step(self, t: int) -> list[Gradients]:
        """Makes local step ``t`` of all workers at once; returns the gradients of each."""
        done = [self._pool.submit(worker.step, t) for worker in self.workers]
        return [future.result(timeout=30) for future in done]

    def compare(self, expected: dict[str, Any], used: list[Gradients], atol: float) -> None:
        center, global_step = self.reader.pull()
        assert global_step == expected["global_step"]
        for name, value in expected["center"].items():
            self._close(center[name], value, atol)
        for worker, gradients, state in zip(self.workers, used, expected["workers"], strict=True):
            assert worker.optimizer.local_step == state["local_step"]
            for name, parameter in worker.model.named_parameters():
                local = state["local"] if name in self.trained else expected["center"]
                self._close(parameter.detach().numpy(), local[name], atol)
                if state["grads_used"].get(name) is None:
                    assert gradients[name] is None
                else:
                    self._close(gradients[name], state["grads_used"][name], atol)
            for slot, value in state["slots"].items():
                variable, _, kind = slot.partition("/")
                if kind:  # Adam's beta powers belong to no variable; torch keeps a step count instead
                    parameter = worker.model.get_parameter(variable)
                    held = worker.optimizer.get_slot(parameter, SLOTS[kind])
                    self._close(held.numpy(), value, atol)

    def _close(self, actual: Any, expected: Any, atol: float) -> None:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        "a_sgd_test_scalars",
        "a2_sgd_const_matrix",
        "b_sgd_lsq_n3_i1",
        "c_momentum_lsq_n2_i3",
        "e_none_gradient_n2_i2",
        "f1_sgd_float64_n2_i2",
        "g_one_worker_i2",
    ],
)
@pytest.mark.parametrize("shared", [False, True], ids=["inline", "shared memory"])
def test_every_step_has_the_numbers_of_the_original(name: str, shared: bool, start_server: StartServer) -> None:
    with Replay(name, start_server, shared) as replay:
        for t, expected in enumerate(replay.trace):
            replay.compare(expected, replay.step(t), replay.atol)
        assert (replay.reader.status().shared_bytes > 0) == shared


def test_adam_with_the_originals_epsilon_has_the_numbers_of_the_original(start_server: StartServer) -> None:
    # The original adds epsilon to sqrt(v), torch to sqrt(v) / sqrt(1 - beta2^t): the same if epsilon is divided, too.
    with Replay("d_adam_lsq_n2_i5", start_server) as replay:
        for t, expected in enumerate(replay.trace):
            for worker in replay.workers:
                worker.optimizer.param_groups[0]["eps"] = ADAM_EPSILON / math.sqrt(1 - BETA2 ** (t + 1))
            replay.compare(expected, replay.step(t), replay.atol)


def test_torchs_adam_differs_from_the_original_only_by_where_epsilon_stands(start_server: StartServer) -> None:
    # Each step differs by at most lr * epsilon / sqrt(v) where v is the smallest second moment; the trace's smallest
    # sqrt(v) is above 1e-5, so 20 steps of lr 0.01 stay below 20 * 0.01 * 1e-8 / 1e-5 = 2e-4. Measured: below 1e-5.
    with Replay("d_adam_lsq_n2_i5", start_server) as replay:
        for t, expected in enumerate(replay.trace):
            replay.compare(expected, replay.step(t), atol=1e-5)
