"""What training during rounds saves on a slow link: `python -m bench.overlap`.

Two workers and a server on hosts of their own (bench/hosts.py) with links of 50 Mbit/s train the small transformer of
study/tasks/text.py with `ModelAverageOptimizer`: once so that training waits for every round, once with
`overlap_steps`. A round takes a little less time than 20 local steps. Each worker is a process that calculates on one
thread.

*Waited* is the time for which training stands still because of rounds: in `step` after the local update, and in the
wait for the last round. That is copies of the model, the push, the wait for the other worker and for the bytes, and the
installation. A run begins after a round that both workers make before they train, and ends for a worker when its last
average is installed. For root on Linux. All of it takes two minutes. Two workers keep two processors busy: the machine
should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.hosts import Network, unavailable_because
from bench.processes import listening_at, serve_command

__all__ = ["OverlapArm", "OverlapSettings", "WorkerTimes", "measure", "overlap_table"]

_PORT = 2222
_WORKERS = 2
_LAST_PART = 5
"""The training loss is the mean over the last steps, this part of all: a fifth."""


@dataclass(frozen=True)
class OverlapSettings:
    """Settings of both arms.

    Args:
        steps: of each worker; a multiple of ``interval_steps``, so that the last one begins a round.
        interval_steps: local steps between the beginnings of two rounds.
        rate_mbit: of every link, in each direction.
        learning_rate: of the workers' optimizers.
        outer: text of the outer optimizer.
        fragment_size_bytes: of the center. The model is a single fragment of the usual size, so that no part of an
            average could be sent while others are pushed.
        seed: of initial values and batches.
    """

    steps: int = 1540
    interval_steps: int = 22
    rate_mbit: float = 50.0
    learning_rate: float = 4e-3
    outer: str = "sgd:lr=1.0,momentum=0.6,nesterov"
    fragment_size_bytes: int = 1 << 16
    seed: int = 0


@dataclass(frozen=True)
class WorkerTimes:
    """What a worker measured.

    Args:
        run_s: from its first step until its last average was installed.
        waited_s: the part of it in rounds, as the module says.
        train_loss: mean of the last fifth of the steps, in nats.
        held_out_loss: of its model at the end, which is the center, in nats.
    """

    run_s: float
    waited_s: float
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class OverlapArm:
    """One arm: what its workers measured."""

    settings: OverlapSettings
    overlap_steps: int
    workers: tuple[WorkerTimes, ...]

    @property
    def run_s(self) -> float:
        """The slowest worker's."""
        return max(worker.run_s for worker in self.workers)

    @property
    def waited(self) -> float:
        """The part of the run that was waited, 0 to 1: mean over the workers."""
        return statistics.fmean(worker.waited_s / worker.run_s for worker in self.workers)

    @property
    def wait_ms(self) -> float:
        """Waited in one round: mean over workers and rounds."""
        rounds = self.settings.steps // self.settings.interval_steps
        return statistics.fmean(worker.waited_s for worker in self.workers) / rounds * 1e3

    @property
    def step_ms(self) -> float:
        """One local step without waits: mean over workers and steps."""
        return statistics.fmean(worker.run_s - worker.waited_s for worker in self.workers) / self.settings.steps * 1e3


def work(address: str, rank: int, overlap_steps: int, settings: OverlapSettings) -> WorkerTimes:
    """One worker process."""
    import torch

    from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession
    from study.tasks import TASKS
    from study.tasks.base import mean_loss_of

    torch.set_num_threads(1)
    task = TASKS["text"]()
    getter = ModelAverageCustomGetter(worker_device="cpu")
    model = getter(task.model(settings.seed))
    inner = task.optimizer(model, settings.learning_rate)
    batches = task.batches(settings.seed, rank, _WORKERS)
    mean_loss_of(model, task.held_out).backward()  # type: ignore[no-untyped-call]  # what torch does once, it does now
    losses, waited_s = list[float](), 0.0
    with ParameterServerSession(
        [address],
        worker_id=f"worker-{rank}",
        is_chief=rank == 0,
        shared_memory=False,
        fragment_size_bytes=settings.fragment_size_bytes,
    ) as session:
        opt = ModelAverageOptimizer(
            inner,
            _WORKERS,
            rank == 0,
            getter,
            settings.interval_steps,
            session=session,
            outer_optimizer=settings.outer,
            overlap_steps=overlap_steps,
        )
        with opt.make_session_run_hook():
            opt.average()  # the workers begin together
            rounds = opt._training.after_step

            def timed(local_step: int, loss: float | torch.Tensor | None) -> None:
                nonlocal waited_s
                before_s = time.perf_counter()
                rounds(local_step, loss)
                waited_s += time.perf_counter() - before_s

            opt._training.after_step = timed  # type: ignore[method-assign]
            began_s = time.perf_counter()
            for step in range(settings.steps):
                for group in inner.param_groups:
                    group["lr"] = settings.learning_rate * task.rate_factor(step / settings.steps)
                opt.zero_grad()
                loss = mean_loss_of(model, next(batches))
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
                opt.step()
            before_s = time.perf_counter()
            opt.wait()
            ended_s = time.perf_counter()
    with torch.no_grad():
        held_out_loss = mean_loss_of(model, task.held_out).item()
    waited_s += ended_s - before_s
    last = losses[-max(1, len(losses) // _LAST_PART) :]
    return WorkerTimes(ended_s - began_s, waited_s, statistics.fmean(last), held_out_loss)


def measure(overlap_steps: int, settings: OverlapSettings) -> OverlapArm:
    """Runs one arm. Raises RuntimeError if a worker fails; its stderr has said why."""
    with Network(_WORKERS + 1, settings.rate_mbit) as network:
        *hosts, server_host = network.hosts
        serve = [*serve_command(f"{server_host.address}:{_PORT}", _WORKERS), "--insecure"]
        address = listening_at(server_host.popen(serve))
        processes = []
        for rank, host in enumerate(hosts):
            told = json.dumps([address, rank, overlap_steps, asdict(settings)])
            processes.append(host.popen([sys.executable, "-m", "bench.overlap", "--worker", told]))
        workers = list[WorkerTimes]()
        for rank, process in enumerate(processes):
            printed, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"worker-{rank} with overlap_steps {overlap_steps} has failed: {process.returncode}")
            workers.append(WorkerTimes(**json.loads(printed)))
    return OverlapArm(settings, overlap_steps, tuple(workers))


def overlap_table(arms: Sequence[OverlapArm]) -> Table:
    """The arms for people."""
    settings = arms[0].settings
    shown = Table(
        title=f"{_WORKERS} workers, {settings.steps} steps, a round every {settings.interval_steps}, links of "
        f"{settings.rate_mbit:g} Mbit/s; losses in nats"
    )
    for column in ("overlap_steps", "run s", "waited", "a round ms", "a step ms", "train loss", "held-out loss"):
        shown.add_column(column, justify="right")
    for arm in arms:
        shown.add_row(
            str(arm.overlap_steps),
            f"{arm.run_s:.1f}",
            f"{arm.waited:.1%}",
            f"{arm.wait_ms:.1f}",
            f"{arm.step_ms:.2f}",
            f"{statistics.fmean(worker.train_loss for worker in arm.workers):.4f}",
            f"{arm.workers[0].held_out_loss:.4f}",
        )
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    usual = OverlapSettings()
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--interval-steps", type=int, default=usual.interval_steps, help="(%(default)s)")
    parser.add_argument("--overlap-steps", type=int, nargs="+", default=[0, 20], help="the arms (0 20)")
    parser.add_argument("--rounds", type=int, help="of each arm (70)")
    parser.add_argument("--rate-mbit", type=float, default=usual.rate_mbit, help="of every link (%(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="(%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-overlap.json"), help="results (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        address, rank, overlap_steps, told = json.loads(arguments.worker)
        print(json.dumps(asdict(work(address, rank, overlap_steps, OverlapSettings(**told)))))
        return 0
    reason = unavailable_because()
    if reason is not None:
        print(f"bench.overlap: skipped: {reason}")
        return 0
    rounds = arguments.rounds or usual.steps // usual.interval_steps // (10 if arguments.quick else 1)
    settings = OverlapSettings(
        rounds * arguments.interval_steps, arguments.interval_steps, arguments.rate_mbit, seed=arguments.seed
    )
    console, arms = Console(width=120), list[OverlapArm]()
    for overlap_steps in arguments.overlap_steps:
        try:
            arms.append(measure(overlap_steps, settings))
        except RuntimeError as error:
            print(f"bench.overlap: {error}", file=sys.stderr)
            return 1
        arm = arms[-1]
        console.print(f"overlap_steps {overlap_steps}: {arm.run_s:.1f} s, waited {arm.waited:.1%}", style="dim")
    console.print(overlap_table(arms))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(arm) for arm in arms], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
