"""What a user pays for a round, beside PyTorch's own averaging with gloo in the same run: `python -m bench.average`.

`opt.average()` of a torch model stands beside `PeriodicModelAverager`; `push_and_average` of one array, with its
defaults, beside an all-reduce and a division. The two take turns. The slowest worker's time counts. Processor seconds
say what a round costs on a machine that is busy with other work: those of one worker, and of the server.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.encryption import security_of, server_tls
from bench.processes import parameter_server
from bench.turns import WARM_UPS

OPTIMIZER, SESSION = "opt.average()", "push_and_average"
TLS = "tls"
TRANSPORTS = ("shared memory", "tcp", TLS)


@dataclass(frozen=True)
class Case:
    """One row: what is called, how the bytes travel, how many float32 parameters in how many tensors, and workers."""

    call: str
    transport: str
    parameters: int
    tensors: int
    workers: int


@dataclass(frozen=True)
class Costs:
    """What a worker's rounds of one kind cost, each: seconds, and processor seconds of its process."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Measures a round, which the body makes."""
        cpu_s, began = time.process_time(), time.perf_counter()
        yield
        self.wall_s.append(time.perf_counter() - began)
        self.cpu_s.append(time.process_time() - cpu_s)


@dataclass(frozen=True)
class Sample:
    """What one worker measured. ``server_cpu_s``: processor seconds of the server for each round."""

    ours: Costs
    theirs: Costs
    server_cpu_s: list[float]


@dataclass(frozen=True)
class Result:
    """One row of the table: medians. CPU times are of one worker, and of the server."""

    call: str
    transport: str
    parameters: int
    tensors: int
    workers: int
    round_ms: float
    gloo_ms: float
    ratio: float
    worker_cpu_ms: float
    server_cpu_ms: float
    gloo_cpu_ms: float
    cpu_ratio: float


def work(
    case: Case,
    rank: int,
    rounds: int,
    address: str,
    server_pid: int,
    ca_file: Path | None,
    gloo_port: int,
    pipe: Connection,
) -> None:
    """One worker process: rounds in turns, checked; sends its Sample. ``ca_file``: the authority; None: no TLS."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import torch
    import torch.distributed as dist

    from bench.sides import ArraySides, ModelSides, Sides, sizes_of
    from ma_client import ParameterServerSession

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{gloo_port}", rank=rank, world_size=case.workers)
    session = ParameterServerSession(
        [address],
        worker_id=f"worker-{rank}",
        is_chief=rank == 0,
        shared_memory=case.transport == "shared memory",
        security=security_of(ca_file),
    )
    sides: Sides
    if case.call == OPTIMIZER:
        sides = ModelSides(session, rank, case.workers, sizes_of(case.parameters, case.tensors))
    else:
        sides = ArraySides(session, rank, case.workers, case.parameters)
    ours, theirs, server_cpu_s = Costs(), Costs(), list[float]()
    for _ in range(WARM_UPS + rounds):
        sides.fill()
        dist.barrier()
        server_before_s = _cpu_s(server_pid)
        dist.barrier()
        with ours.one():
            sides.ours()
        dist.barrier()
        server_cpu_s.append(_cpu_s(server_pid) - server_before_s)
        dist.barrier()
        with theirs.one():
            sides.theirs()
        sides.check()
    pipe.send(Sample(_counted(ours), _counted(theirs), server_cpu_s[WARM_UPS:]))
    dist.barrier()
    session.close()
    dist.destroy_process_group()


def measure(case: Case, rounds: int) -> Result:
    """Runs one row."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gloo_port = probe.getsockname()[1]
    with ExitStack() as stack:
        flags, ca_file = stack.enter_context(server_tls(case.transport == TLS))
        address, server_pid = stack.enter_context(parameter_server(case.workers, *flags))
        pipes, processes = [], []
        for rank in range(case.workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (case, rank, rounds, address, server_pid, ca_file, gloo_port, theirs)
            process = context.Process(target=work, args=arguments)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        samples: list[Sample] = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    round_ms = _slowest_ms([sample.ours.wall_s for sample in samples])
    gloo_ms = _slowest_ms([sample.theirs.wall_s for sample in samples])
    worker_cpu_ms = 1e3 * statistics.median(s for sample in samples for s in sample.ours.cpu_s)
    gloo_cpu_ms = 1e3 * statistics.median(s for sample in samples for s in sample.theirs.cpu_s)
    server_cpu_ms = 1e3 * statistics.median(samples[0].server_cpu_s)
    return Result(
        **asdict(case),
        round_ms=round_ms,
        gloo_ms=gloo_ms,
        ratio=round_ms / gloo_ms,
        worker_cpu_ms=worker_cpu_ms,
        server_cpu_ms=server_cpu_ms,
        gloo_cpu_ms=gloo_cpu_ms,
        cpu_ratio=(case.workers * worker_cpu_ms + server_cpu_ms) / (case.workers * gloo_cpu_ms),
    )


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    shown = Table(title="what a round costs its user, beside gloo; ratios are what counts")
    for column in ("call", "transport", "parameters", "tensors", "workers", "round ms", "gloo ms", "ratio"):
        shown.add_column(column, justify="right")
    for column in ("CPU ms: worker", "server", "gloo", "ratio of all"):
        shown.add_column(column, justify="right")
    for r in results:
        times = (f"{ms:.1f}" for ms in (r.worker_cpu_ms, r.server_cpu_ms, r.gloo_cpu_ms))
        shown.add_row(
            r.call,
            r.transport,
            f"{r.parameters:,}",
            f"{r.tensors:,}",
            str(r.workers),
            f"{r.round_ms:.1f}",
            f"{r.gloo_ms:.1f}",
            f"{r.ratio:.2f}",
            *times,
            f"{r.cpu_ratio:.2f}",
        )
    return shown


def _counted(costs: Costs) -> Costs:
    return Costs(costs.wall_s[WARM_UPS:], costs.cpu_s[WARM_UPS:])


def _slowest_ms(rounds_s: Sequence[Sequence[float]]) -> float:
    """The median over the rounds of the slowest worker's time."""
    slowest_s = [max(times) for times in zip(*rounds_s, strict=True)]
    median_s: float = statistics.median(slowest_s)
    return 1e3 * median_s


def _cpu_s(pid: int) -> float:
    """Processor seconds, user and system, of a process and its threads so far."""
    clock = (~pid << 3) | 2  # CPUCLOCK_SCHED of the process, as clock_getcpuclockid(3) makes it
    seconds: float = time.clock_gettime(clock)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.average", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="models of 1 M parameters, in 150 tensors; under a minute")
    parser.add_argument("--parameters", type=int, help="of a torch model (default: 12 M)")
    parser.add_argument("--tensors", type=int, nargs="+", help="of a torch model (150 2000)")
    parser.add_argument("--workers", type=int, nargs="+", default=(2,), help="(2)")
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="only these rows")
    parser.add_argument("--call", nargs="+", choices=(OPTIMIZER, SESSION), default=(OPTIMIZER, SESSION))
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each kind (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-average.json"), help="results (%(default)s)")
    arguments = parser.parse_args(argv)
    parameters = arguments.parameters or (1_000_000 if arguments.quick else 12_000_000)
    tensor_counts = arguments.tensors or ((150,) if arguments.quick else (150, 2_000))
    array = 1_000_000 if arguments.quick else 10_000_000
    cases = []
    for workers in arguments.workers:
        for transport in arguments.transport:
            cases += [Case(OPTIMIZER, transport, parameters, tensors, workers) for tensors in tensor_counts]
            cases.append(Case(SESSION, transport, array, 1, workers))
    console = Console(width=160)
    results = [measure(case, arguments.rounds) for case in cases if case.call in arguments.call]
    console.print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
