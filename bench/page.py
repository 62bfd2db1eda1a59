"""What the page costs while browsers look at it: `python -m bench.page`.

A server and two workers run as processes on this machine, over TCP. Blocks of rounds alternate in the same processes:
while five streams of the page are read, and while none is. The ratio is the geometric mean of those of neighbouring
blocks, beside its standard error. The readers parse nothing, as a browser's work is not the server's, but they run on
the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.processes import listening_at, serve_command

__all__ = ["PageCost", "main", "measure"]

BROWSERS = 5
_WARM_UP_ROUNDS = 20
_REQUEST = b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True)
class PageCost:
    """One row: medians of a round's time, and the mean ratio of neighbouring blocks with its standard error."""

    parameters: int
    blocks: int
    rounds: int
    alone_ms: float
    watched_ms: float
    ratio: float
    error: float
    read_bytes: int


@contextmanager
def _server_with_page() -> Iterator[tuple[str, str]]:
    """A server's address, and its page's URL."""
    command = [*serve_command("127.0.0.1:0", 2), "--page-bind", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = listening_at(process)
            yield address, next(line.split()[-1] for line in process.stdout if "page at" in line)
        finally:
            process.terminate()


def _push_forever(address: str, parameters: int) -> None:
    """The other worker."""
    from ma_client import ParameterServerSession

    values = {"x": np.ones(parameters, np.float32)}
    with ParameterServerSession([address], worker_id="worker-1", shared_memory=False) as session:
        session.pull()
        while True:
            session.push_and_average(values)


def _browse(url: str, pipe: Connection) -> None:
    """Opens the streams when told True and closes them when told False; answers when all have begun or ended, with the
    bytes read so far."""
    parts, read = urlsplit(url), [0]
    place = parts.hostname or "", parts.port or 0

    def read_all(stream: socket.socket) -> None:
        with suppress(ConnectionResetError):
            while data := stream.recv(1 << 16):
                read[0] += len(data)

    streams = list[socket.socket]()
    threads = list[threading.Thread]()
    while (wanted := pipe.recv()) is not None:
        if wanted and not streams:
            streams = [socket.create_connection(place) for _ in range(BROWSERS)]
            for stream in streams:
                stream.sendall(_REQUEST)
                stream.recv(1)
            threads = [threading.Thread(target=read_all, args=(stream,)) for stream in streams]
            for thread in threads:
                thread.start()
        elif not wanted:
            for stream in streams:
                stream.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            while streams:
                streams.pop().close()
        pipe.send(read[0])


def measure(parameters: int, blocks: int, block_s: float) -> PageCost:
    """Runs one row.

    Args:
        parameters: float32, of the model.
        blocks: of each kind.
        block_s: the length of each.
    """
    from ma_client import ParameterServerSession

    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        address, url = stack.enter_context(_server_with_page())
        ours, theirs = context.Pipe()
        session = stack.enter_context(
            ParameterServerSession([address], worker_id="worker-0", is_chief=True, shared_memory=False)
        )
        values = {"x": np.zeros(parameters, np.float32)}
        session.initialize(values)
        session.pull()
        for target, arguments in ((_push_forever, (address, parameters)), (_browse, (url, theirs))):
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
        theirs.close()
        for _ in range(_WARM_UP_ROUNDS):
            session.push_and_average(values)
        alone_s, watched_s, rounds, read_bytes = list[float](), list[float](), 0, 0
        for number in range(2 * blocks):
            # ABBA: what drifts meets both alike.
            is_watched = number % 4 in (1, 2)
            ours.send(is_watched)
            read_bytes = ours.recv()
            round_s = list[float]()
            until_s = time.perf_counter() + block_s
            while (began_s := time.perf_counter()) < until_s:
                session.push_and_average(values)
                round_s.append(time.perf_counter() - began_s)
            # Of a block the mean: what the page does once a second is in few of its rounds.
            (watched_s if is_watched else alone_s).append(statistics.fmean(round_s))
            rounds += len(round_s)
    logs = [math.log(watched / alone) for watched, alone in zip(watched_s, alone_s, strict=True)]
    ratio, error = math.exp(statistics.fmean(logs)), statistics.stdev(logs) / math.sqrt(blocks)
    alone, watched = statistics.median(alone_s), statistics.median(watched_s)
    return PageCost(parameters, blocks, rounds, alone * 1e3, watched * 1e3, ratio, error, read_bytes)


def _table(costs: list[PageCost]) -> Table:
    shown = Table(title=f"a round of two workers while {BROWSERS} browsers look at the page, and while none does")
    for column in ("parameters", "blocks", "rounds", "alone ms", "watched ms", "ratio", "read MB"):
        shown.add_column(column, justify="right")
    for cost in costs:
        shown.add_row(
            f"{cost.parameters:,}",
            str(cost.blocks),
            f"{cost.rounds:,}",
            f"{cost.alone_ms:.3f}",
            f"{cost.watched_ms:.3f}",
            f"{cost.ratio:.3f} ± {cost.error:.3f}",
            f"{cost.read_bytes / 1e6:.1f}",
        )
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small model and short blocks, half a minute")
    parser.add_argument("--blocks", type=int, default=24, help="of each kind (%(default)s)")
    parser.add_argument("--block-s", type=float, default=2.5, help="the length of a block (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-page.json"), help="results (%(default)s)")
    arguments = parser.parse_args(argv)
    cases: tuple[int, ...]
    if arguments.quick:
        cases, blocks, block_s = (1_000,), 6, 2.5
    else:
        cases, blocks, block_s = (1_000, 1_000_000, 10_000_000), arguments.blocks, arguments.block_s
    costs = [measure(parameters, blocks, block_s) for parameters in cases]
    Console(width=120).print(_table(costs))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
