"""The cost of a round, compared with gloo's all-reduce in the same processes: `make bench`.

For every row, one parameter server and the workers run as processes on this machine. bench/turns.py says how a round is
measured; the slowest worker's time counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.encryption import security_of, server_tls
from bench.processes import parameter_server, peak_bytes, resident_bytes
from bench.turns import Turns, over_workers, take_turns, tolerance_of, values_of

NESTEROV = "sgd:lr=0.7,momentum=0.9,nesterov"
TRANSPORTS = ("shared memory", "unix socket", "tcp, messages", "tcp")
"""The last one: with a data connection for what is worth it."""
TLS_TRANSPORTS = ("tls, messages", "tls")
"""The same with TLS."""
CODED_TRANSPORTS = ("tcp, messages", "tcp")
COMPRESSIONS = ("int8", "int4")


@dataclass(frozen=True)
class Case:
    """One row: how the bytes travel, how many float32 parameters, how many workers, the outer optimizer as text, the
    compression."""

    transport: str
    parameters: int
    workers: int
    outer: str = "average"
    compression: str = "none"


@dataclass(frozen=True)
class Sample:
    """What one worker measured: its rounds, and its peak memory over what it had before, in bytes."""

    round_turns: Turns
    gloo_turns: Turns
    extra_bytes: int


@dataclass(frozen=True)
class Result:
    """One row of the table. Spread is (largest - smallest) / median; memory is the peak over the same process idle, a
    worker's without the model itself; shared pages count where `peak_bytes` says. The center is in the server's, with
    the outer optimizer's state."""

    transport: str
    parameters: int
    workers: int
    outer: str
    compression: str
    round_ms: float
    round_spread: float
    gloo_ms: float
    gloo_spread: float
    ratio: float
    wire_bytes_per_round: int
    server_extra_bytes: int
    worker_extra_bytes: int


def work(
    case: Case, rank: int, rounds: int, address: str, gloo_port: int, pipe: Connection, ca_file: Path | None
) -> None:
    """One worker process: alternating rounds, checked; sends its Sample. ``ca_file``: the authority; None: no TLS."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import torch
    import torch.distributed as dist

    from ma_client import ParameterServerSession
    from modelaverage.outer import AVERAGE, outer_optimizer

    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{gloo_port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.workers)
    local, mean = values_of(rank, case.workers, case.parameters)
    reduced = torch.zeros(case.parameters)
    # Once beforehand, so that gloo's own buffers do not count as ours.
    dist.all_reduce(reduced)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    idle_bytes = resident_bytes(os.getpid())
    session = ParameterServerSession(
        [address],
        worker_id=f"worker-{rank}",
        is_chief=rank == 0,
        shared_memory=case.transport == "shared memory",
        security=security_of(ca_file),
    )
    outer = outer_optimizer(case.outer)
    if rank == 0:
        session.initialize({"x": local}, outer_optimizer=outer, compression=case.compression)
    first, _ = session.pull(copy=False)
    # Only what an outer optimizer's results are compared with costs memory of its own.
    center = None if outer == AVERAGE else first["x"].copy()
    round_turns, gloo_turns = take_turns(
        session, local, mean, reduced, rounds, outer, center, tolerance_of(case.compression, case.workers)
    )
    extra_bytes = peak_bytes(os.getpid(), "modelaverage-center") - idle_bytes
    pipe.send(Sample(round_turns, gloo_turns, extra_bytes))
    pipe.recv()  # the server's memory is measured while all workers are connected
    session.close()
    dist.destroy_process_group()


def measure(case: Case, rounds: int) -> Result:
    """Runs one row."""
    with server_tls(case.transport.startswith("tls")) as (flags, ca_file):
        return _measured(case, rounds, flags, ca_file)


def _measured(case: Case, rounds: int, tls_flags: tuple[str, ...], ca_file: Path | None) -> Result:
    from ma_client import ParameterServerSession

    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gloo_port = probe.getsockname()[1]
    flags = (*tls_flags, "--data-port", "off") if case.transport.endswith(", messages") else tls_flags
    with parameter_server(case.workers, *flags, unix_socket=case.transport == "unix socket") as (address, server_pid):
        idle_bytes = resident_bytes(server_pid)
        pipes, processes = [], []
        for rank in range(case.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(case, rank, rounds, address, gloo_port, theirs, ca_file))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        samples: list[Sample] = [pipe.recv() for pipe in pipes]
        server_extra_bytes = peak_bytes(server_pid, "modelaverage-contribution") - idle_bytes
        with ParameterServerSession([address], worker_id="bench", security=security_of(ca_file)) as session:
            status = session.status()
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()
    round_s, round_spread = over_workers([sample.round_turns for sample in samples])
    gloo_s, gloo_spread = over_workers([sample.gloo_turns for sample in samples])
    return Result(
        transport=case.transport,
        parameters=case.parameters,
        workers=case.workers,
        outer=case.outer,
        compression=case.compression,
        round_ms=round_s * 1e3,
        round_spread=round_spread,
        gloo_ms=gloo_s * 1e3,
        gloo_spread=gloo_spread,
        ratio=round_s / gloo_s,
        wire_bytes_per_round=(status.received_bytes + status.sent_bytes - status.shared_bytes) // status.global_step,
        server_extra_bytes=server_extra_bytes,
        worker_extra_bytes=max(sample.extra_bytes for sample in samples),
    )


def table(results: list[Result]) -> Table:
    """The results for people."""
    shown = Table(title="one averaging round on this machine; ratios are what counts")
    for column in ("transport", "parameters", "workers", "outer", "coded", "round ms", "spread", "gloo ms", "spread"):
        shown.add_column(column, justify="right")
    for column in ("ratio", "wire MB/round", "server + MB", "worker + MB"):
        shown.add_column(column, justify="right")
    for r in results:
        shown.add_row(
            r.transport,
            f"{r.parameters:,}",
            str(r.workers),
            r.outer.partition(":")[0],
            "" if r.compression == "none" else r.compression,
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
    parser.add_argument("--transport", nargs="+", choices=(*TRANSPORTS, *TLS_TRANSPORTS), help="only these rows")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each kind (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-round.json"), help="results (%(default)s)")
    arguments = parser.parse_args(argv)
    parameters = (1_000, 1_000_000, 10_000_000) if arguments.quick else (1_000, 1_000_000, 10_000_000, 50_000_000)
    workers = (2,) if arguments.quick else (2, 4, 8)
    cases = [Case(t, p, w) for p in parameters for w in workers for t in TRANSPORTS]
    beside = Case("shared memory", 10_000_000, 2)  # the same round with an outer optimizer
    cases.insert(cases.index(beside) + 1, replace(beside, outer=NESTEROV))
    for transport in CODED_TRANSPORTS:
        raw = Case(transport, 10_000_000, 2)  # the same round in fewer bytes
        at = cases.index(raw) + 1
        cases[at:at] = [replace(raw, compression=compression) for compression in COMPRESSIONS]
    if not arguments.quick:
        cases.append(Case("tcp", 10_000_000, 16))  # the server's memory is the same as with two
    cases += [Case(transport, 10_000_000, 2) for transport in TLS_TRANSPORTS]
    cases = [case for case in cases if arguments.transport is None or case.transport in arguments.transport]
    console, results = Console(width=160), []
    for case in cases:
        console.print(
            f"{case.transport}: {case.parameters:,} parameters, {case.workers} workers, {case.outer}, "
            f"compression {case.compression}",
            style="dim",
        )
        results.append(measure(case, arguments.rounds))
    console.print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
