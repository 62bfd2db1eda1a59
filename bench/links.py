"""The cost of a round when links are the limit, compared with gloo's all-reduce on the same hosts: `make bench`.

Hosts are network namespaces (bench/hosts.py) with links of 1 Gbit; each has a worker, a server, or both. bench/turns.py
says how a round is measured; the slowest worker's time counts. All hosts share this machine's processors, so a row in
which these are busy measures them more than the links. Shared memory is switched off, also between a worker and the
server beside it: namespaces of one kernel could use it, separate hosts cannot.

Rows with compression are compared with the same row without it, at 1 Gbit and at 100 Mbit: `--codecs` measures these
only. MB/link is what the kernel counted at worker 0's link in a round, in both directions together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.hosts import INTERFACE, Network, unavailable_because
from bench.processes import listening_at, serve_command
from bench.stream import stream_mb_per_s
from bench.turns import Turns, over_workers, take_turns, tolerance_of, values_of

# The required bounds apply to these settings.
PARAMETERS = 10_000_000
RATE_MBIT = 1000.0
PS_PORT = 2222
GLOO_PORT = 29500
# The longest wait for a round after a process has died.
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Case:
    """One row: the numbers of workers and servers, each on its own host or a server beside each worker; the rate of the
    links (0: as `Settings` says) and the compression; and the required upper bounds: a ratio to the model's time on one
    link, a ratio to gloo's time, and one to the time of the same row without compression. Slow and coded rows have no
    gloo."""

    workers: int
    servers: int
    beside: bool = False
    asked_of_link: float | None = None
    asked_of_gloo: float | None = None
    rate_mbit: float = 0.0
    compression: str = "none"
    asked_of_raw: float | None = None

    @property
    def hosts(self) -> int:
        """The number of hosts that the row needs."""
        return self.workers if self.beside else self.workers + self.servers

    @property
    def with_gloo(self) -> bool:
        """Whether gloo is measured, too."""
        return not self.rate_mbit and self.compression == "none"

    @property
    def raw(self) -> tuple[int, int, bool, float]:
        """What this row has in common with its row without compression."""
        return self.workers, self.servers, self.beside, self.rate_mbit


CASES = (
    Case(4, 4, asked_of_link=1.20, asked_of_gloo=0.8),
    Case(4, 4, beside=True, asked_of_gloo=1.1),
    Case(2, 2, asked_of_link=1.15),
    Case(4, 1),
    Case(2, 1),
)
SLOW_MBIT = 100.0
CODECS = (
    Case(4, 4, compression="int8", asked_of_raw=0.45),
    Case(4, 4, compression="int4", asked_of_raw=0.35),
    Case(4, 4, rate_mbit=SLOW_MBIT),
    Case(4, 4, rate_mbit=SLOW_MBIT, compression="int8", asked_of_raw=0.30),
    Case(4, 4, rate_mbit=SLOW_MBIT, compression="int4", asked_of_raw=0.17),
)


@dataclass(frozen=True)
class Settings:
    """Settings of all rows: float32 parameters, measured rounds of each kind, and the links."""

    parameters: int
    rounds: int
    rate_mbit: float
    congestion_control: str
    fragment_size_bytes: int | None
    data_port: str = "0"

    def network(self, num_hosts: int) -> Network:
        """Hosts."""
        return Network(num_hosts, self.rate_mbit, self.congestion_control)

    def stream_mb_per_s(self) -> float:
        """What a plain TCP stream of half a second gets."""
        with self.network(2) as network:
            return stream_mb_per_s(network.hosts[0], network.hosts[1], int(self.rate_mbit * 1e6 / 8 / 2))

    def at(self, case: Case) -> Settings:
        """With the rate of a row's links."""
        return replace(self, rate_mbit=case.rate_mbit or self.rate_mbit)

    @property
    def model_ms(self) -> float:
        """How long the model takes on one link."""
        return self.parameters * 4 * 8 / (self.rate_mbit * 1e6) * 1e3


@dataclass(frozen=True)
class Seat:
    """What the process of one worker is told."""

    rank: int
    workers: int
    parameters: int
    rounds: int
    ps_hosts: list[str]
    gloo_store: str
    fragment_size_bytes: int | None
    compression: str
    with_gloo: bool


@dataclass(frozen=True)
class Result:
    """One row of the table. Spread is (largest - smallest) / median; busy is the share of the processors' time."""

    case: Case
    settings: Settings
    round_ms: float
    round_spread: float
    round_busy: float
    link_mb: float
    gloo_ms: float | None
    gloo_spread: float | None
    gloo_busy: float | None
    ratio_to_gloo: float | None
    ratio_to_link: float


def work(seat: Seat) -> None:
    """One worker process: prints what it measured."""
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    os.environ["GRPC_VERBOSITY"] = "NONE"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or it would complain that addresses have no names

    import torch
    import torch.distributed as dist

    from ma_client import ParameterServerSession

    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", seat.gloo_store, timeout, seat.workers, seat.rank)
    local, mean = values_of(seat.rank, seat.workers, seat.parameters)
    with ParameterServerSession(
        seat.ps_hosts,
        worker_id=f"worker-{seat.rank}",
        is_chief=seat.rank == 0,
        fragment_size_bytes=seat.fragment_size_bytes,
        shared_memory=False,
        round_timeout_s=TIMEOUT_S,
    ) as session:
        if seat.rank == 0:
            session.initialize({"x": local}, compression=seat.compression)
        session.pull(copy=False)
        turns = take_turns(
            session,
            local,
            mean,
            torch.zeros(seat.parameters),
            seat.rounds,
            tolerance=tolerance_of(seat.compression, seat.workers),
            with_gloo=seat.with_gloo,
        )
    print(json.dumps([asdict(one) for one in turns]))
    dist.destroy_process_group()


def measure(case: Case, settings: Settings) -> Result:
    """Runs one row. Raises RuntimeError if a worker fails; its stderr has said why."""
    settings = settings.at(case)
    with settings.network(case.hosts) as network:
        workers = network.hosts[: case.workers]
        servers = [
            host.popen(
                [
                    *serve_command(f"{host.address}:{PS_PORT}", case.workers),
                    "--insecure",
                    "--data-port",
                    settings.data_port,
                ]
            )
            for host in network.hosts[-case.servers :]
        ]
        ps_hosts = [listening_at(server) for server in servers]
        store = f"tcp://{workers[0].address}:{GLOO_PORT}"
        processes = []
        for rank, host in enumerate(workers):
            seat = Seat(
                rank,
                case.workers,
                settings.parameters,
                settings.rounds,
                ps_hosts,
                store,
                settings.fragment_size_bytes,
                case.compression,
                case.with_gloo,
            )
            processes.append(host.popen([sys.executable, "-m", "bench.links", "--worker", json.dumps(asdict(seat))]))
        measured = []
        for rank, process in enumerate(processes):
            printed, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"worker-{rank} of {case} has failed with exit code {process.returncode}")
            measured.append([Turns(**turns) for turns in json.loads(printed)])
    ours, gloo = zip(*measured, strict=True)
    round_s, round_spread = over_workers(ours)
    gloo_s, gloo_spread = over_workers(gloo) if case.with_gloo else (None, None)
    return Result(
        case=case,
        settings=settings,
        round_ms=round_s * 1e3,
        round_spread=round_spread,
        round_busy=ours[0].busy,
        link_mb=statistics.median(ours[0].link_bytes) / 1e6,
        gloo_ms=None if gloo_s is None else gloo_s * 1e3,
        gloo_spread=gloo_spread,
        gloo_busy=None if gloo_s is None else gloo[0].busy,
        ratio_to_gloo=None if gloo_s is None else round_s / gloo_s,
        ratio_to_link=round_s * 1e3 / settings.model_ms,
    )


def table(results: list[Result], settings: Settings) -> Table:
    """The results for people."""
    shown = Table(
        title=f"one averaging round of {settings.parameters:,} float32 parameters; the model takes "
        f"{settings.model_ms:.0f} ms on a link of {settings.rate_mbit:g} Mbit/s"
    )
    for column in ("workers", "servers", "hosts", "Mbit/s", "coded", "round ms", "spread", "busy", "MB/link"):
        shown.add_column(column, justify="right")
    for column in ("gloo ms", "spread", "busy", "x gloo", "asked", "x model / link", "asked", "x raw", "asked"):
        shown.add_column(column, justify="right")
    raw_ms = {r.case.raw: r.round_ms for r in results if r.case.compression == "none"}
    for r in results:
        coded = r.case.compression != "none"
        shown.add_row(
            str(r.case.workers),
            str(r.case.servers),
            str(r.case.hosts),
            f"{r.settings.rate_mbit:g}",
            r.case.compression if coded else "",
            f"{r.round_ms:.1f}",
            f"{r.round_spread:.0%}",
            f"{r.round_busy:.0%}",
            f"{r.link_mb:.1f}",
            _number(r.gloo_ms, ".1f"),
            _number(r.gloo_spread, ".0%"),
            _number(r.gloo_busy, ".0%"),
            _number(r.ratio_to_gloo, ".2f"),
            _asked(r.case.asked_of_gloo, settings),
            f"{r.ratio_to_link:.2f}",
            _asked(r.case.asked_of_link, settings),
            _number(r.round_ms / raw_ms[r.case.raw] if coded and r.case.raw in raw_ms else None, ".2f"),
            _asked(r.case.asked_of_raw, settings),
        )
    return shown


def _number(number: float | None, spec: str) -> str:
    return "" if number is None else format(number, spec)


def _asked(ratio: float | None, settings: Settings) -> str:
    asked = ratio is not None and (settings.parameters, settings.rate_mbit) == (PARAMETERS, RATE_MBIT)
    return f"{ratio:.2f}" if asked else ""


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 M parameters, 3 rounds, two workers only")
    parser.add_argument("--parameters", type=int, help="float32 parameters (10 M)")
    parser.add_argument("--rounds", type=int, help="measured rounds of each kind (9)")
    parser.add_argument("--rate-mbit", type=float, default=RATE_MBIT, help="of every link, either way (%(default)s)")
    parser.add_argument("--congestion-control", default="reno", help="of TCP on the hosts (%(default)s)")
    parser.add_argument("--fragment-bytes", type=int, help="unit of transfer (the session's choice)")
    parser.add_argument("--data-port", default="0", help="of the servers; off: fragments go in messages (%(default)s)")
    parser.add_argument("--codecs", action="store_true", help="only the rows that compare compressions")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-links.json"), help="results (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        work(Seat(**json.loads(arguments.worker)))
        return 0
    reason = unavailable_because()
    if reason is not None:
        print(f"bench.links: skipped: {reason}")
        return 0
    settings = Settings(
        arguments.parameters or (1_000_000 if arguments.quick else PARAMETERS),
        arguments.rounds or (3 if arguments.quick else 9),
        arguments.rate_mbit,
        arguments.congestion_control,
        arguments.fragment_bytes,
        arguments.data_port,
    )
    console, results = Console(width=170), []
    console.print(f"link: a plain TCP stream gets {settings.stream_mb_per_s():.1f} MB/s")
    cases = (CASES[0], *CODECS) if arguments.codecs else (*CASES, *CODECS)
    for case in (case for case in cases if case.workers == 2 or not arguments.quick):
        rate_mbit = settings.at(case).rate_mbit
        console.print(
            f"{case.workers} workers, {case.servers} servers, {case.hosts} hosts, {rate_mbit:g} Mbit/s, compression "
            f"{case.compression}",
            style="dim",
        )
        try:
            results.append(measure(case, settings))
        except RuntimeError as error:
            print(f"bench.links: {error}", file=sys.stderr)
            return 1
    console.print(table(results, settings))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
