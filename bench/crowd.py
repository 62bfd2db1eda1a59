"""Many workers with a model of some size at one server on this machine: `python -m bench.crowd`.

Beside the parameter server stands the least that could do its work: plain sockets whose bytes go straight into numpy
arrays, are added one worker after the other, and whose mean is sent back. Compared is what the server's process uses:
processor seconds for each GB that it receives, and memory beyond what it has before the first worker comes. Workers are
threads of a few processes, all over TCP on loopback. Rounds of both take turns in one run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.processes import parameter_server, peak_bytes, resident_bytes
from modelaverage.addresses import parse
from modelaverage.commands import flag_types

__all__ = ["main"]

_PROCESSES = 2
_WARM_UPS = 1


@dataclass(frozen=True)
class Crowd:
    """Who pushes what.

    Args:
        workers: of the job.
        parameters: float32 elements of the model, one variable.
    """

    workers: int
    parameters: int

    @property
    def model_bytes(self) -> int:
        """Of the model."""
        return 4 * self.parameters

    def values(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """What this worker pushes."""
        return np.full(self.parameters, number % 2, np.float32)

    def check(self, mean: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
        """Raises RuntimeError if this is not the mean of all workers' values."""
        wanted = np.float32((self.workers // 2) / self.workers)
        if not np.all(np.abs(mean - wanted) < 1e-6):
            raise RuntimeError(f"the mean is {mean.min():g} to {mean.max():g}, not {wanted:g}")


def _session_rounds(crowd: Crowd, address: str, number: int) -> Iterator[None]:
    from ma_client import ParameterServerSession

    values = {"x": crowd.values(number)}
    with ParameterServerSession(
        (address,), worker_id=f"worker-{number}", is_chief=number == 0, shared_memory=False
    ) as session:
        if number == 0:
            session.initialize({"x": np.zeros(crowd.parameters, np.float32)})
        session.pull()
        while True:
            crowd.check(session.push_and_average(values, copy=False).center["x"])
            yield


def _socket_rounds(crowd: Crowd, address: str, number: int) -> Iterator[None]:
    values, mean = crowd.values(number), np.empty(crowd.parameters, np.float32)
    host = parse(address)
    with socket.create_connection((host.host, host.port)) as connection:
        while True:
            connection.sendall(values.data.cast("B"))
            _receive(connection, mean)
            crowd.check(mean)
            yield


def _receive(connection: socket.socket, into: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    left = into.data.cast("B")
    while left:
        count = connection.recv_into(left)
        if not count:
            raise ConnectionError("the connection has ended")
        left = left[count:]


def _serve_sockets(crowd: Crowd, pipe: Connection) -> None:
    """The server's process of plain sockets; runs until it is terminated."""
    total, received = np.empty(crowd.parameters, np.float32), np.empty(crowd.parameters, np.float32)
    with socket.create_server(("127.0.0.1", 0), backlog=crowd.workers) as listener:
        pipe.send(f"127.0.0.1:{listener.getsockname()[1]}")
        connections = [listener.accept()[0] for _ in range(crowd.workers)]
        with suppress(ConnectionError):  # the workers have gone
            while True:
                total.fill(0)
                for connection in connections:
                    _receive(connection, received)
                    total += received
                total /= crowd.workers
                for connection in connections:
                    connection.sendall(total.data.cast("B"))


@contextmanager
def _socket_server(crowd: Crowd) -> Iterator[tuple[str, int]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_sockets, args=(crowd, theirs), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        yield ours.recv(), process.pid
    finally:
        process.terminate()
        process.join()


_SIDES: dict[str, Callable[[Crowd, str, int], Iterator[None]]] = {"ours": _session_rounds, "sockets": _socket_rounds}


def _work(crowd: Crowd, side: str, address: str, numbers: Sequence[int], pipe: Connection) -> None:
    """A process of some workers; each message on the pipe asks for that many rounds of all, and is answered."""
    barrier = threading.Barrier(len(numbers) + 1)
    asked, failures = [0], list[BaseException]()

    def run(number: int) -> None:
        rounds = _SIDES[side](crowd, address, number)
        try:
            while True:
                barrier.wait()
                for _ in range(asked[0]):
                    next(rounds)
                barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    try:
        while True:
            asked[0] = pipe.recv()
            barrier.wait()
            barrier.wait()
            pipe.send(None)
    except threading.BrokenBarrierError:
        pipe.send(repr(failures[0]))
    except EOFError:
        pass
    os._exit(0)  # the workers hold connections open


class _Side:
    """One server and its workers."""

    def __init__(self, name: str, crowd: Crowd, stack: ExitStack) -> None:
        self._crowd, context = crowd, multiprocessing.get_context("spawn")
        server = parameter_server(crowd.workers) if name == "ours" else _socket_server(crowd)
        address, self._pid = stack.enter_context(server)
        self._idle_bytes = resident_bytes(self._pid)
        self._pipes = list[Connection]()
        for index in range(_PROCESSES):
            ours, theirs = context.Pipe()
            numbers = range(index, crowd.workers, _PROCESSES)
            process = context.Process(target=_work, args=(crowd, name, address, numbers, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(ours.close)
            self._pipes.append(ours)

    def cpu_s_per_gb(self, rounds: int) -> float:
        """Runs these rounds. Raises RuntimeError if one fails."""
        before_s = self._cpu_s()
        for pipe in self._pipes:
            pipe.send(rounds)
        for pipe in self._pipes:
            failed = pipe.recv()
            if failed is not None:
                raise RuntimeError(f"a worker has failed: {failed}")
        received_gb = rounds * self._crowd.workers * self._crowd.model_bytes / 1e9
        return (self._cpu_s() - before_s) / received_gb

    @property
    def extra_bytes(self) -> int:
        """The most memory that the server has had, beyond what it had before the first worker came."""
        return peak_bytes(self._pid) - self._idle_bytes

    def _cpu_s(self) -> float:
        # The clock of another process's processor time (clock_getcpuclockid); /proc has it in steps of 10 ms only.
        return time.clock_gettime((~self._pid << 3) | 2)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.crowd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=flag_types.count, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--parameters", type=flag_types.count, default=1_000_000, metavar="N", help="float32 (%(default)s)"
    )
    parser.add_argument("--turns", type=flag_types.count, default=9, metavar="N", help="of each side (%(default)s)")
    parser.add_argument("--rounds", type=flag_types.count, default=2, metavar="N", help="a turn (%(default)s)")
    arguments = parser.parse_args(argv)
    crowd, console = Crowd(arguments.workers, arguments.parameters), Console()
    with ExitStack() as stack:
        try:
            sides = [_Side(name, crowd, stack) for name in _SIDES]
            for side in sides:
                side.cpu_s_per_gb(_WARM_UPS)
            turns = [
                [side.cpu_s_per_gb(arguments.rounds) for side in sides]
                for _ in track(range(arguments.turns), "turns", console=console, transient=True)
            ]
        except RuntimeError as error:
            print(f"bench.crowd: {error}", file=sys.stderr)
            return 1
        shown = Table(title=f"{crowd.workers} workers, {crowd.parameters:,} float32 parameters, one server")
        for title in ("", "CPU s/GB received", "x sockets", "memory + MiB"):
            shown.add_column(title, justify="left" if not title else "right")
        for index, (name, side) in enumerate(zip(_SIDES, sides, strict=True)):
            taken = statistics.median(turn[index] for turn in turns)
            ratio = statistics.median(turn[index] / turn[-1] for turn in turns)
            shown.add_row(name, f"{taken:.2f}", f"{ratio:.2f}", f"{side.extra_bytes / 2**20:.0f}")
        console.print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
