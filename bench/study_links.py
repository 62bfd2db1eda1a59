"""What a step of the study's arms takes over links: `python -m bench.study_links`.

Every worker is a process on a host of its own (bench/hosts.py), with a server beside it that keeps a part of the model.
Every host's link has 1 Gbit/s, 100 Mbit/s or 20 Mbit/s. Messages are real: gloo's all-reduce of the gradient in every
step for synchronous training, as DistributedDataParallel does with one bucket, and pushes and averages of
`ParameterServerSession` for the other arms. Computation is not: each worker sleeps for as long as a batch takes one
free processor, since four workers' machines have four. A run begins at a barrier of all workers; the slowest counts.
The times are written beside the study's trainings, and `python -m study --page` makes times to a loss of them.

For root on Linux; nothing else should run. It takes six minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.hosts import INTERFACE, Network, unavailable_because
from bench.processes import listening_at, serve_command
from bench.turns import link_bytes
from modelaverage.commands import flag_types
from study.arm import Arm
from study.links import LinkTimes, StepTime, link_times_path
from study.plan import FULL, TIMED, PlannedArm
from study.tasks import TASKS
from study.tasks.base import mean_loss_of

__all__ = ["LinkSeat", "main", "measure_step"]

RATES_MBIT = (1000.0, 100.0, 20.0)
_PORT, _GLOO_PORT = 2222, 29500
# The model is less than one fragment of the usual size, and only whole fragments are dealt out to servers: of these,
# each of four servers has one. Smaller ones cost processor time, which four workers share here.
_FRAGMENT_BYTES = 1 << 17
_TIMEOUT = timedelta(seconds=300)
_BATCHES, _WARM_UP_BATCHES = 60, 10
_LEAST_STEPS, _ROUNDS = 40, 6
"""Of a run: whole rounds, and at least this many steps."""


@dataclass(frozen=True)
class LinkSeat:
    """What the process of one worker is told.

    Args:
        rank: the worker's number, from 0.
        num_workers: of all.
        store: tcp://HOST:PORT where gloo's ranks meet.
        addresses: of the parameter servers; none: every step all-reduces a gradient.
        sizes: elements of every variable.
        batch_s: to sleep in every step.
        steps: of the run.
        interval_steps, codec, outer, late_steps: as in `Arm`.
    """

    rank: int
    num_workers: int
    store: str
    addresses: tuple[str, ...]
    sizes: tuple[int, ...]
    batch_s: float
    steps: int
    interval_steps: int
    codec: str
    outer: str
    late_steps: int


def measure_step(planned: PlannedArm, rate_mbit: float, batch_s: float) -> StepTime:
    """One arm over one kind of link. Raises RuntimeError if a worker fails; its stderr has said why."""
    arm = planned.template
    sizes = tuple(parameter.numel() for parameter in TASKS[arm.task]().model(0).parameters())
    steps = -(-max(_LEAST_STEPS, _ROUNDS * arm.interval_steps) // arm.interval_steps) * arm.interval_steps
    with Network(arm.num_workers, rate_mbit) as network:
        hosts, addresses = network.hosts, tuple[str, ...]()
        if arm.variation.method != "synchronous":
            servers = [
                host.popen([*serve_command(f"{host.address}:{_PORT}", arm.num_workers), "--insecure"]) for host in hosts
            ]
            addresses = tuple(map(listening_at, servers))
        seats = [
            LinkSeat(
                rank,
                arm.num_workers,
                f"tcp://{hosts[0].address}:{_GLOO_PORT}",
                addresses,
                sizes,
                batch_s,
                steps,
                arm.interval_steps,
                arm.codec,
                arm.outer,
                arm.late_steps,
            )
            for rank in range(arm.num_workers)
        ]
        processes = [
            host.popen([sys.executable, "-m", "bench.study_links", "--seat", json.dumps(asdict(seat))])
            for host, seat in zip(hosts, seats, strict=True)
        ]
        found = [_answer(process, f"{planned.name}, worker {rank}") for rank, process in enumerate(processes)]
    return StepTime(planned.name, rate_mbit, max(step_s for step_s, _ in found), max(sent for _, sent in found))


def _answer(process: subprocess.Popen[str], name: str) -> tuple[float, float]:
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} has failed: {process.returncode}")
    step_s, link_bytes = json.loads(printed)
    return step_s, link_bytes


def _work(seat: LinkSeat) -> tuple[float, float]:
    """One worker process; returns seconds and link bytes of a step."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    dist.init_process_group("gloo", seat.store, _TIMEOUT, seat.num_workers, seat.rank)
    run = _rounds(seat) if seat.addresses else _gradients(seat)
    run(seat.interval_steps)  # connections are made, and buffers
    dist.barrier()
    bytes_before, began_s = link_bytes(), time.perf_counter()
    run(seat.steps)
    took_s, sent = time.perf_counter() - began_s, link_bytes() - bytes_before
    dist.barrier()
    dist.destroy_process_group()
    return took_s / seat.steps, sent / seat.steps


def _gradients(seat: LinkSeat) -> Callable[[int], None]:
    import torch
    import torch.distributed as dist

    gradient = torch.zeros(sum(seat.sizes))

    def run(steps: int) -> None:
        for _ in range(steps):
            time.sleep(seat.batch_s)
            dist.all_reduce(gradient)

    return run


def _rounds(seat: LinkSeat) -> Callable[[int], None]:
    from ma_client import ParameterServerSession

    chances = np.random.default_rng(seat.rank)
    local = {f"v{n}": chances.standard_normal(size).astype(np.float32) for n, size in enumerate(seat.sizes)}
    session = ParameterServerSession(
        seat.addresses,
        worker_id=f"worker-{seat.rank}",
        is_chief=seat.rank == 0,
        shared_memory=False,
        fragment_size_bytes=_FRAGMENT_BYTES,
    )
    if seat.rank == 0:
        compression = "none" if seat.codec == "raw" else seat.codec
        session.initialize(local, outer_optimizer=seat.outer, compression=compression)
    session.pull()

    def run(steps: int) -> None:
        for _ in range(steps // seat.interval_steps):
            time.sleep((seat.interval_steps - seat.late_steps) * seat.batch_s)
            ticket = session.begin_push(local)
            time.sleep(seat.late_steps * seat.batch_s)
            ticket.result()

    return run


def _batch_s(arm: Arm) -> float:
    """The time of a batch on one thread."""
    import torch

    torch.set_num_threads(1)
    task = TASKS[arm.task]()
    model = task.model(0)
    optimizer, batches = task.optimizer(model, 1e-3), task.batches(0, 0, arm.num_workers)
    began_s = 0.0
    for index in range(_WARM_UP_BATCHES + _BATCHES):
        if index == _WARM_UP_BATCHES:
            began_s = time.perf_counter()
        optimizer.zero_grad()
        mean_loss_of(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (time.perf_counter() - began_s) / _BATCHES


def _table(times: LinkTimes) -> Table:
    shown = Table(title=f"ms a step of which {times.batch_s * 1e3:.1f} are computation (slept)")
    shown.add_column("arm")
    for rate in times.rates_mbit:
        shown.add_column(f"{rate:g} Mbit/s", justify="right")
    shown.add_column("KB at the link", justify="right")
    for arm in dict.fromkeys(each.arm for each in times.steps):
        found = [each for rate in times.rates_mbit if (each := times.at(arm, rate)) is not None]
        shown.add_row(arm, *(f"{each.step_s * 1e3:.1f}" for each in found), f"{found[-1].link_bytes / 1e3:.1f}")
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study_links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", default=TIMED, help="arms of the study (all that it times)"
    )
    parser.add_argument("--rates-mbit", nargs="+", type=float, default=RATES_MBIT, metavar="RATE", help="(1000 100 20)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--batch-ms",
        type=flag_types.positive,
        metavar="MS",
        help="computation in a step (as long as a batch takes here)",
    )
    parser.add_argument("--seat", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.seat is not None:
        print(json.dumps(_work(LinkSeat(**json.loads(arguments.seat)))))
        return 0
    reason = unavailable_because()
    if reason is not None:
        print(f"bench.study_links: skipped: {reason}")
        return 0
    planned = {each.name: each for each in FULL.arms}
    unknown = [name for name in arguments.arms if name not in planned]
    if unknown:
        print(f"bench.study_links: the study has no arm {unknown[0]!r}; `python -m study --list`", file=sys.stderr)
        return 2
    console = Console()
    is_given, found = arguments.batch_ms is not None, list[StepTime]()
    batch_s = arguments.batch_ms / 1e3 if is_given else _batch_s(FULL.arms[0].template)
    for rate in arguments.rates_mbit:
        for name in arguments.arms:
            try:
                found.append(measure_step(planned[name], rate, batch_s))
            except RuntimeError as error:
                print(f"bench.study_links: {error}", file=sys.stderr)
                return 1
            console.print(f"{name}, {rate:g} Mbit/s: {found[-1].step_s * 1e3:.1f} ms a step", style="dim")
    times = LinkTimes(batch_s, tuple(found), batch_was_measured=not is_given)
    times.save(link_times_path(arguments.runs))
    console.print(_table(times))
    console.print(f"written: {link_times_path(arguments.runs)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
