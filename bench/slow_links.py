"""Rounds over slow links with long queues before them: `python -m bench.slow_links`.

A worker and a server on hosts of their own (bench/hosts.py) initialize a center, pull it and make a round, in messages
or on a data connection. It prints how long each takes beside bytes over bandwidth, and how often anything broke: a call
that was made again, a data connection that was given up. For root on Linux. Cells run side by side, each on its own
links; their processors have little to do. All of it takes 20 minutes, `--quick` 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.hosts import Network, unavailable_because
from bench.processes import listening_at, serve_command
from ma_client import ParameterServerSession
from modelaverage.runtime import data_sockets as data_connection
from modelaverage.v1 import parameter_server_pb2 as pb

RATES_MBIT = (0.5, 1.0, 2.0, 10.0)
QUEUES_BYTES = (128 << 10, 4 << 20)
MODELS_MB = (3, 12)
_PORT = 2222
_CONNECT_TIMEOUT_S = _STATUS_TIMEOUT_S = 120.0
# Hosts of one machine are nearer to each other than the ends of any slow link: data connections would keep their queues
# short for that.
_SERVE = """
import sys
from modelaverage.runtime import data_sockets as data_connection
from ps_server.__main__ import main
data_connection._SHORT_WAY_US = 0
sys.exit(main(sys.argv[1:]))
"""
_AT_ONCE = 16
# A data connection is opened beside the first push, and used by those after it.
_MOST_ROUNDS = 4


@dataclass(frozen=True)
class Cell:
    """One row.

    Args:
        rate_mbit: of both links, either way.
        queue_bytes: what may wait before each, either way.
        model_mb: size of the model in millions of bytes, all float32.
        data_connection: whether there may be one.
    """

    rate_mbit: float
    queue_bytes: int
    model_mb: float
    data_connection: bool

    @property
    def link_s(self) -> float:
        """The model's bytes through the link's bandwidth."""
        return self.model_mb * 8 / self.rate_mbit


@dataclass(frozen=True)
class Result:
    """What the worker of a cell measured.

    Args:
        initialize_s: the chief's call.
        pull_s: the pull after it.
        round_s: the round, the first one on a data connection if there may be one.
        on_data_connection: whether that round's bytes went there.
        breaks: what was said of anything that broke.
    """

    initialize_s: float
    pull_s: float
    round_s: float
    on_data_connection: bool
    breaks: tuple[str, ...]


class _Breaks(logging.Handler):
    """Keeps what the session logs: it logs only what went wrong."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def work(address: str, cell: Cell) -> Result:
    """The worker: initializes, pulls, makes rounds."""
    vars(data_connection).update(_SHORT_WAY_US=0)
    breaks = _Breaks()
    logging.getLogger("ma_client").addHandler(breaks)
    logging.getLogger("ma_client").setLevel(logging.INFO)
    model = {"w": np.zeros(int(cell.model_mb * 1e6) // 4, np.float32)}
    with ParameterServerSession(
        [address], worker_id="worker-0", is_chief=True, shared_memory=False, connect_timeout_s=_CONNECT_TIMEOUT_S
    ) as session:
        times_s = [time.monotonic()]
        session.initialize(model)
        times_s.append(time.monotonic())
        session.pull()
        times_s.append(time.monotonic())
        round_s, beside = 0.0, False
        for _ in range(_MOST_ROUNDS if cell.data_connection else 1):
            began_s = time.monotonic()
            session.push_and_average({"w": model["w"] + 1})
            round_s = time.monotonic() - began_s
            transport = session.status(_STATUS_TIMEOUT_S).workers[0].transport
            beside = transport == pb.TRANSPORT_DATA_CONNECTION
            if beside:
                break
    return Result(times_s[1] - times_s[0], times_s[2] - times_s[1], round_s, beside, tuple(breaks.said))


def measure(cell: Cell) -> Result:
    """Runs one cell. Raises RuntimeError: its worker has failed."""
    with Network(2, cell.rate_mbit, queue_bytes=cell.queue_bytes) as network:
        worker_host, server_host = network.hosts
        data_port = "0" if cell.data_connection else "off"
        serve = [sys.executable, "-c", _SERVE, *serve_command(f"{server_host.address}:{_PORT}", 1)[3:]]
        serve += ["--insecure", "--data-port", data_port]
        address = listening_at(server_host.popen(serve))
        told = json.dumps([address, asdict(cell)])
        worker = worker_host.popen([sys.executable, "-m", "bench.slow_links", "--worker", told])
        printed, _ = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"the worker of {cell} has failed with exit code {worker.returncode}")
    return Result(**json.loads(printed))


def cells(quick: bool) -> list[Cell]:
    """All cells, those that take longest first."""
    rates_mbit, models_mb = ((2.0, 10.0), (3,)) if quick else (RATES_MBIT, MODELS_MB)
    found = [
        Cell(rate_mbit, queue_bytes, model_mb, data_connection)
        for rate_mbit in rates_mbit
        for queue_bytes in QUEUES_BYTES
        for model_mb in models_mb
        for data_connection in (False, True)
    ]
    return sorted(found, key=lambda cell: cell.link_s * (1 + cell.data_connection), reverse=True)


def table(results: Sequence[tuple[Cell, Result]]) -> Table:
    """The results as a table."""
    shown = Table(title="one worker, one server; seconds, and how many times the model's bytes through the bandwidth")
    columns = (
        "Mbit/s",
        "queue KB",
        "model MB",
        "way",
        "bytes / bandwidth",
        "initialize",
        "pull",
        "round",
        "x",
        "breaks",
    )
    for column in columns:
        shown.add_column(column, justify="right")
    for cell, r in sorted(results, key=lambda row: tuple(asdict(row[0]).values())):
        shown.add_row(
            f"{cell.rate_mbit:g}",
            f"{cell.queue_bytes >> 10}",
            f"{cell.model_mb:g}",
            _way(cell, r),
            f"{cell.link_s:.1f}",
            f"{r.initialize_s:.1f}",
            f"{r.pull_s:.1f}",
            f"{r.round_s:.1f}",
            f"{r.round_s / cell.link_s:.2f}",
            str(len(r.breaks)),
        )
    return shown


def _way(cell: Cell, result: Result) -> str:
    if not cell.data_connection:
        return "messages"
    return "data connection" if result.on_data_connection else "messages, though it might have had a connection"


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.slow_links", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 and 10 Mbit/s and the small model only")
    parser.add_argument("--at-once", type=int, default=_AT_ONCE, metavar="N", help="cells side by side (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-slow-links.json"), help="results (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        address, cell = json.loads(arguments.worker)
        print(json.dumps(asdict(work(address, Cell(**cell)))))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is undone first
    reason = unavailable_because()
    if reason is not None:
        print(f"bench.slow_links: skipped: {reason}")
        return 0
    console, results = Console(width=140), list[tuple[Cell, Result]]()
    with ThreadPoolExecutor(arguments.at_once) as threads:
        running = {threads.submit(measure, cell): cell for cell in cells(arguments.quick)}
        for future in as_completed(running):
            cell = running[future]
            try:
                result = future.result()
            except (RuntimeError, OSError, ValueError) as error:
                print(f"bench.slow_links: {error}", file=sys.stderr)
                continue
            results.append((cell, result))
            console.print(
                f"{cell.rate_mbit:g} Mbit/s, queue {cell.queue_bytes >> 10} KB, {cell.model_mb:g} MB, "
                f"{_way(cell, result)}: "
                f"initialize {result.initialize_s:.1f} s, pull {result.pull_s:.1f} s, round {result.round_s:.1f} s; "
                f"bytes / bandwidth {cell.link_s:.1f} s; {len(result.breaks)} breaks",
                style="dim",
            )
            for said in result.breaks:
                console.print(f"    {said}", markup=False)
    console.print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(cell), **asdict(result)} for cell, result in results]
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0 if len(results) == len(running) and not any(result.breaks for _, result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
