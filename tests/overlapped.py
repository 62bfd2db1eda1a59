"""A job whose workers train during rounds and whose center can be computed beforehand; the worker also as a process
that a test kills:

python -m tests.overlapped '{"addresses": ["127.0.0.1:2222"], "worker": 0, "rounds": 6, "death": ["when it is pushed",
3]}': prints the `global_step` whenever it has installed a center.

The inner optimizer subtracts whole numbers, which depend on worker and step only. So float32 is exact, a round has the
same bits at whatever step its average is installed, and a worker that starts again from a center trains the same steps.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession, PushResult
from ma_client.torch.rounds import Rounds
from ma_client.transports.base import OutgoingPush
from tests.faults import HANG_S, Model, Training

__all__ = [
    "INTERVAL_STEPS",
    "OVERLAP_STEPS",
    "START",
    "WHILE_IT_TRAINS",
    "WORKER_MOMENTS",
    "OverlappedTraining",
    "after",
    "train",
    "without",
]

INTERVAL_STEPS, OVERLAP_STEPS = 5, 3
START: Model = {"w": np.zeros(380, np.float32), "b": np.ones((), np.float32), "c": np.ones(3, np.float32)}
# By name: the function's owner, the function, and whether it still runs before SIGKILL.
WORKER_MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "before its push": (Rounds, "begin_push", False),
    "when its push has begun": (Rounds, "begin_push", True),
    "in the middle of its fragments": (OutgoingPush, "fragment", True),
    "before the average is installed": (Rounds, "install_under", False),
    "after the average is installed": (Rounds, "install_under", True),
}
WHILE_IT_TRAINS = "while it trains and its push is under way"
"""Another moment."""


def subtracted(worker: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What a worker's local step subtracts from a variable: whole numbers."""
    return torch.from_numpy(np.asarray(np.random.default_rng((worker, step)).integers(-8, 8, shape), np.float32))


def is_meanwhile(steps: int, global_step: int) -> bool:
    """Whether the last of these steps came after a push whose average is not installed yet."""
    return steps // INTERVAL_STEPS > global_step and steps % INTERVAL_STEPS > 0


def after(center: Model, workers: int, rounds: int) -> Model:
    """The center after this many rounds in which nothing was lost and nothing counted twice, to the bit."""
    steps = [(worker, step) for worker in range(workers) for step in range(rounds * INTERVAL_STEPS)]
    return {
        name: value - sum(subtracted(*each, value.shape).numpy() for each in steps) / np.float32(workers)
        for name, value in center.items()
    }


def without(worker: int, round_index: int, center: Model) -> Model:
    """The center of two workers after rounds of which one had nothing of this worker, given that of all pushes."""
    steps = range(round_index * INTERVAL_STEPS, (round_index + 1) * INTERVAL_STEPS)
    return {
        name: value
        + sum(subtracted(worker, each, value.shape).numpy() for each in steps) / np.float32(2)
        - sum(subtracted(1 - worker, each, value.shape).numpy() for each in steps) / np.float32(2)
        for name, value in center.items()
    }


def train(
    session: ParameterServerSession,
    worker: int,
    start: Model,
    rounds: int,
    workers: int,
    installed: Callable[[PushResult], None] = lambda _: None,
    stepped: Callable[[int, int], None] = lambda *_: None,
) -> Model:
    """Trains with `ModelAverageOptimizer` until `global_step` is ``rounds``; returns the local variables.

    Args:
        installed: called with the result of each round once its center is installed.
        stepped: called after each step with how many steps are done, of all rounds, and `global_step`.
    """
    model = torch.nn.Module()
    for name, value in start.items():
        model.register_parameter(name, torch.nn.Parameter(torch.from_numpy(np.array(value))))
    getter = ModelAverageCustomGetter(worker_device="cpu")
    inner = torch.optim.SGD(getter(model).parameters(), lr=1.0)
    opt = ModelAverageOptimizer(
        inner, workers, worker == 0, getter, INTERVAL_STEPS, session=session, overlap_steps=OVERLAP_STEPS
    )
    seen: PushResult | None = None

    def see() -> None:
        nonlocal seen
        if opt.last_round is not None and opt.last_round is not seen:
            seen = opt.last_round
            installed(seen)

    with opt.make_session_run_hook():
        for step in range(opt.global_step * INTERVAL_STEPS, rounds * INTERVAL_STEPS):
            for parameter in model.parameters():
                parameter.grad = subtracted(worker, step, tuple(parameter.shape))
            opt.step()
            see()
            stepped(step + 1, opt.global_step)
        opt.wait()
        see()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@dataclass
class OverlappedTraining(Training):
    """Workers as threads.

    Args:
        meanwhile: how many steps returned while a round of their worker was under way.
        steps: by worker, how many steps are done.
    """

    meanwhile: int = 0
    steps: dict[int, int] = field(default_factory=dict)

    def _work(self, worker: int) -> Model:
        def stepped(steps: int, global_step: int) -> None:
            self.steps[worker] = steps
            self.meanwhile += is_meanwhile(steps, global_step)

        with self.session(worker) as session:
            made = self.results[worker].append
            return train(session, worker, self.start, self.rounds, self.workers, made, stepped)

    def expected(self) -> Model:
        """See `Training`."""
        return after(self.start, self.workers, self.rounds)


# The worker as a process.


def _arm(moment: str, count: int) -> None:
    """SIGKILL, the ``count``-th time that this moment comes."""
    owner, name, runs_before = WORKER_MOMENTS[moment]
    original, reached, lock = getattr(owner, name), 0, threading.Lock()

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal reached
        with lock:  # several servers get fragments at once
            reached += 1
            now = reached == count
        if now and not runs_before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def _work(addresses: Sequence[str], worker: int, workers: int, rounds: int, death: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    steps_left = math.inf
    if death is not None and death[0] == WHILE_IT_TRAINS:
        steps_left = death[1]
    elif death is not None:
        _arm(*death)

    def stepped(steps: int, global_step: int) -> None:
        nonlocal steps_left
        steps_left -= is_meanwhile(steps, global_step)
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with ParameterServerSession(
        addresses,
        worker_id=f"worker-{worker}",
        is_chief=worker == 0,
        fragment_size_bytes=256,
        shared_memory=False,
        connect_timeout_s=HANG_S,
        reconnect_timeout_s=HANG_S,
        round_timeout_s=2 * HANG_S,
    ) as session:
        train(session, worker, START, rounds, workers, lambda result: print(result.global_step, flush=True), stepped)


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
