"""What a round costs, beside gloo's all-reduce in the same processes: `make bench`.

For every row, one parameter server and the workers run as processes on this machine. A measured round begins when all
workers stand at a gloo barrier and ends, for a worker, when it has the average; the slowest worker's time counts.
Rounds of the parameter server and of gloo (all-reduce, then divide) alternate, so both meet the same machine. Every
element of every result is checked.
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.processes import parameter_server, peak_bytes, resident_bytes

WARM_UPS = 2


@dataclass(frozen=True)
class Case:
    """One row: how the bytes travel, how many float32 parameters, how many workers."""

    transport: str
    parameters: int
    workers: int


@dataclass(frozen=True)
class Sample:
    """What one worker measured: seconds of each round, and its peak memory over what it had before, in bytes."""

    round_s: list[float]
    gloo_s: list[float]
    extra_bytes: int


@dataclass(frozen=True)
class Result:
    """One row of the table. Spread is (largest - smallest) / median; memory is the peak over the same process idle, a
    worker's without the model itself; shared pages count where `peak_bytes` says."""

    transport: str
    parameters: int
    workers: int
    round_ms: float
    round_spread: float
    gloo_ms: float
    gloo_spread: float
    ratio: float
    wire_bytes_per_round: int
    server_extra_bytes: int
    worker_extra_bytes: int


def work(case: Case, rank: int, rounds: int, address: str, gloo_port: int, pipe: Connection) -> None:
    """One worker process: alternating rounds, checked; sends its Sample."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import torch
    import torch.distributed as dist

    from ma_client import ParameterServerSession

    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{gloo_port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.workers)
    values = np.arange(case.parameters, dtype=np.float32) % 1024
    mean = values + np.float32((case.workers - 1) / 2)
    local = {"x": values + np.float32(rank)}
    # Once now, so that the buffers that gloo makes for itself do not count as ours.
    reduced = torch.from_numpy(values)
    dist.all_reduce(reduced)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    idle_bytes = resident_bytes(os.getpid())
    session = ParameterServerSession(
        [address], worker_id=f"worker-{rank}", is_chief=rank == 0, shared_memory=case.transport == "shared memory"
    )
    if rank == 0:
        session.initialize(local)
    session.pull(copy=False)
    round_s, gloo_s = [], []
    # Rounds of a tiny model are timed many at a time: a barrier's own jitter is longer than one of them.
    repeat = max(1, 50_000 // case.parameters)
    for turn in range(WARM_UPS + rounds):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeat):
            result = session.push_and_average(local, copy=False)
        round_s.append((time.perf_counter() - began) / repeat)
        assert np.array_equal(result.center["x"], mean), f"round {turn} is wrong"
        reduced.copy_(torch.from_numpy(local["x"]))
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeat):
            dist.all_reduce(reduced)
            reduced.div_(case.workers)
        gloo_s.append((time.perf_counter() - began) / repeat)
        assert repeat > 1 or np.array_equal(reduced.numpy(), mean), f"gloo's round {turn} is wrong"
    extra_bytes = peak_bytes(os.getpid(), "modelaverage-center") - idle_bytes
    pipe.send(Sample(round_s[WARM_UPS:], gloo_s[WARM_UPS:], extra_bytes))
    pipe.recv()  # the server's memory is looked at while all workers are there
    session.close()
    dist.destroy_process_group()


def measure(case: Case, rounds: int) -> Result:
    """Runs one row."""
    from ma_client import ParameterServerSession

    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gloo_port = probe.getsockname()[1]
    with parameter_server(case.workers, unix_socket=case.transport == "unix socket") as (address, server_pid):
        idle_bytes = resident_bytes(server_pid)
        pipes, processes = [], []
        for rank in range(case.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(case, rank, rounds, address, gloo_port, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        samples: list[Sample] = [pipe.recv() for pipe in pipes]
        server_extra_bytes = peak_bytes(server_pid, "modelaverage-contribution") - idle_bytes
        with ParameterServerSession([address], worker_id="bench") as session:
            status = session.status()
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()
    slowest = [max(times) for times in zip(*(sample.round_s for sample in samples), strict=True)]
    gloo = [max(times) for times in zip(*(sample.gloo_s for sample in samples), strict=True)]
    return Result(
        transport=case.transport,
        parameters=case.parameters,
        workers=case.workers,
        round_ms=statistics.median(slowest) * 1e3,
        round_spread=(max(slowest) - min(slowest)) / statistics.median(slowest),
        gloo_ms=statistics.median(gloo) * 1e3,
        gloo_spread=(max(gloo) - min(gloo)) / statistics.median(gloo),
        ratio=statistics.median(slowest) / statistics.median(gloo),
        wire_bytes_per_round=(status.received_bytes + status.sent_bytes - status.shared_bytes) // status.global_step,
        server_extra_bytes=server_extra_bytes,
        worker_extra_bytes=max(sample.extra_bytes for sample in samples),
    )


def table(results: list[Result]) -> Table:
    """The results for people."""
    shown = Table(title="one averaging round on this machine; ratios are what counts")
    for column in ("transport", "parameters", "workers", "round ms", "spread", "gloo ms", "spread", "ratio"):
        shown.add_column(column, justify="right")
    for column in ("wire MB/round", "server + MB", "worker + MB"):
        shown.add_column(column, justify="right")
    for r in results:
        shown.add_row(
            r.transport,
            f"{r.parameters:,}",
            str(r.workers),
            f"{r.round_ms:.2f}",
            f"{r.round_spread:.0%}",
            f"{r.gloo_ms:.2f}",
            f"{r.gloo_spread:.0%}",
            f"{r.ratio:.2f}",
            f"{r.wire_bytes_per_round / 1e6:.1f}",
            f"{r.server_extra_bytes / 1e6:.0f}",
            f"{r.worker_extra_bytes / 1e6:.0f}",
        )
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.round", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models and two workers only, under a minute")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each kind (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-round.json"), help="results (%(default)s)")
    arguments = parser.parse_args(argv)
    parameters = (1_000, 1_000_000, 10_000_000) if arguments.quick else (1_000, 1_000_000, 10_000_000, 50_000_000)
    workers = (2,) if arguments.quick else (2, 4, 8)
    cases = [Case(t, p, w) for p in parameters for w in workers for t in ("shared memory", "unix socket", "tcp")]
    if not arguments.quick:
        cases.append(Case("tcp", 10_000_000, 16))  # the server's memory is the same as with two
    console, results = Console(width=140), []
    for case in cases:
        console.print(f"{case.transport}: {case.parameters:,} parameters, {case.workers} workers", style="dim")
        results.append(measure(case, arguments.rounds))
    console.print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
