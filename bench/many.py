"""Many workers with a tiny model at one server: `make bench`.

A few client processes hold all workers' connections open at once, one connection a worker, and speak the protocol
directly on asyncio, so that what is measured is the server. Every element of every result is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import grpc.aio
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.processes import parameter_server, peak_bytes, resident_bytes
from modelaverage import wire
from modelaverage.manifest import Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb

PARAMETERS = 1_000
CLIENT_PROCESSES = 4
WARM_UPS = 1
_MANIFEST = Manifest((Variable("x", "float32", (PARAMETERS,)),))


@dataclass(frozen=True)
class Result:
    """One row: the seconds of a round for a number of workers, and what the server used."""

    workers: int
    round_ms: float
    round_ms_per_worker: float
    server_threads: int
    server_extra_bytes: int


class RawWorker:
    """One worker on a connection of its own."""

    def __init__(self, address: str, number: int, workers: int) -> None:
        # Without this, gRPC would share one connection among all channels of a process.
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._initialize = self._channel.stream_unary(f"/{wire.SERVICE}/Initialize", None, None)
        self._push = self._channel.stream_stream(f"/{wire.SERVICE}/PushAndAverage", None, None)
        self._worker_id, self._workers = f"worker-{number}", workers
        self._incarnation = os.urandom(16)
        values = np.full(PARAMETERS, float(number % 2), np.float32)
        self._fragment = wire.encode_fragment(0, (values.data.cast("B"),))
        self._mean = np.full(PARAMETERS, (workers // 2) / workers, np.float32)

    async def initialize(self) -> None:
        """Sets the center to zeros."""
        header = pb.InitializeHeader(worker_id=self._worker_id, manifest=wire.manifest_to_message(_MANIFEST))
        messages = [pb.InitializeRequest(header=header).SerializeToString()]
        messages.append(wire.encode_fragment(0, (bytes(PARAMETERS * 4),)))
        await self._initialize(iter(messages))

    async def round(self, step: int) -> None:
        """One push, checked."""
        header = pb.PushHeader(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            push_id=step,
            base_step=step,
            manifest_id=_MANIFEST.id,
            fragments_follow=True,
        )
        call = self._push()  # type: ignore[call-arg]
        await call.write(pb.PushAndAverageRequest(header=header).SerializeToString() + self._fragment)
        await call.done_writing()
        data = await call.read()
        assert isinstance(data, bytes), "the stream ended"
        answer = wire.parse(pb.PushAndAverageResponse, data)
        assert np.array_equal(np.frombuffer(answer.fragment.data, np.float32), self._mean), "the average is wrong"
        assert answer.outcome.outcome == pb.OUTCOME_COMMITTED
        assert answer.outcome.global_step == step + 1
        assert len(answer.outcome.contributors) == self._workers
        assert not isinstance(await call.read(), bytes), "the stream goes on"

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close(None)


def client(address: str, numbers: range, workers: int, rounds: int, barrier: Barrier, pipe: Connection) -> None:
    """One client process: its workers' rounds, begun together with the other processes'."""
    os.environ["GRPC_VERBOSITY"] = "NONE"

    async def run() -> list[float]:
        raw = [RawWorker(address, number, workers) for number in numbers]
        if 0 in numbers:
            await raw[0].initialize()
        times = []
        for step in range(WARM_UPS + rounds):
            await asyncio.to_thread(barrier.wait)
            began = time.perf_counter()
            await asyncio.gather(*(worker.round(step) for worker in raw))
            times.append(time.perf_counter() - began)
        await asyncio.to_thread(barrier.wait)
        for worker in raw:
            await worker.close()
        return times[WARM_UPS:]

    pipe.send(asyncio.run(run()))


def measure(workers: int, rounds: int) -> Result:
    """Runs one row."""
    context = multiprocessing.get_context("spawn")
    processes_count = min(CLIENT_PROCESSES, workers)
    barrier = context.Barrier(processes_count + 1)
    with parameter_server(workers) as (address, server_pid):
        idle_bytes = resident_bytes(server_pid)
        pipes, processes = [], []
        for index in range(processes_count):
            ours, theirs = context.Pipe()
            numbers = range(index, workers, processes_count)
            process = context.Process(target=client, args=(address, numbers, workers, rounds, barrier, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for _ in range(WARM_UPS + rounds):
            barrier.wait()
        threads = len(os.listdir(f"/proc/{server_pid}/task"))
        barrier.wait()
        times: list[list[float]] = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
        server_extra_bytes = peak_bytes(server_pid) - idle_bytes
    median_s = statistics.median(max(round_s) for round_s in zip(*times, strict=True))
    return Result(workers, median_s * 1e3, median_s * 1e3 / workers, threads, server_extra_bytes)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.many", description="Many workers with a tiny model.")
    parser.add_argument("--quick", action="store_true", help="up to 64 workers only")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-many.json"), help="results (%(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(width=140)
    results = [measure(w, arguments.rounds) for w in ((2, 16, 64) if arguments.quick else (2, 16, 64, 256, 1000))]
    shown = Table(title=f"a round of {PARAMETERS:,} float32 parameters")
    for column in ("workers", "round ms", "ms per worker", "server threads", "server + MB"):
        shown.add_column(column, justify="right")
    for r in results:
        row = (r.workers, f"{r.round_ms:.1f}", f"{r.round_ms_per_worker:.2f}", r.server_threads)
        shown.add_row(*map(str, row), f"{r.server_extra_bytes / 1e6:.1f}")
    console.print(shown)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
