"""How long a job waits, and how long in silence, when a part of it fails: `python -m bench.waits`.

Two workers make rounds of some MB with a server, on hosts of their own (bench/hosts.py), and a reader pulls the center
every second. Then one fault (bench/trouble.py) happens for a while. The table shows: the longest silence, in which
neither server nor workers logged, finished or refused anything; the longest push or pull, from its call to its end; the
last log line in that time of the process that waited; how long after the fault rounds were made again; and whether all
values that were received were right. For root on Linux; nothing on the machine stays changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.hosts import Network, unavailable_because
from bench.processes import serve_command
from bench.told import WORKERS, Line, Seat, Transcript, play
from bench.trouble import DATA_PORT, FAULTS, Fault, Scene

PARAMETERS = 1_000_000
RATE_MBIT = 1000.0
_PORT = 2222
_START_S = 60.0
_RECOVERY_S = 120.0
_ROUNDS_BEFORE = 3
_SHOWN = 80
_ERRORS_TOO = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh"]  # on stdout
_WORKERS = [f"worker-{rank}" for rank in range(WORKERS)]


@dataclass(frozen=True)
class Result:
    """One row.

    Args:
        fault: its name.
        lasted_s: how long the fault lasted.
        silence_s: the longest silence.
        wait_s: the longest wait.
        who: the process with the longest wait.
        said: its last log line during that wait.
        ended: whether the wait has ended.
        recovered_after_s: seconds from the end of the fault until all workers made rounds; None: never.
        errors: calls that raised.
        right: whether all received values were right.
    """

    fault: str
    lasted_s: float
    silence_s: float
    wait_s: float
    who: str
    said: str
    ended: bool
    recovered_after_s: float | None
    errors: int
    right: bool


def measure(fault: Fault, lasts_s: float, transcript: Transcript) -> Result:
    """Runs one row. Raises RuntimeError if the job does not even start."""
    with ExitStack() as cleanup:
        network = cleanup.enter_context(Network(WORKERS + 1, RATE_MBIT))
        directory = cleanup.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        scene = Scene(network, Path(directory))
        flags = fault.prepare(scene, cleanup)
        address = f"{scene.server.address}:{_PORT}"
        serve = [*serve_command(address, WORKERS), "--insecure", "--data-port", str(DATA_PORT), *flags]
        server = scene.server.popen([*_ERRORS_TOO, *serve])
        transcript.listen("server", server)
        _until(transcript, lambda lines: any("listening" in line.text for line in lines), "the server does not listen")
        scene.server_pid = server.pid
        for host, rank in [*zip(scene.workers, range(WORKERS), strict=True), (scene.workers[0], None)]:
            seat = Seat(rank, address, PARAMETERS, fault.one_host)
            command = [sys.executable, "-m", "bench.waits", "--seat", json.dumps(asdict(seat))]
            process = host.popen([*_ERRORS_TOO, *command])
            transcript.listen("reader" if rank is None else f"worker-{rank}", process)
            if rank is not None:
                scene.worker_pids.append(process.pid)
        _until(transcript, _all_beside, "the workers' bytes go in messages")
        from_s = time.monotonic()
        with fault.happen(scene):
            time.sleep(lasts_s)
            over_s = time.monotonic()
        recovered = transcript.until(lambda lines: _recovered_at_s(lines, over_s) is not None, _RECOVERY_S)
        return evaluate(fault.name, transcript.lines, from_s, over_s, time.monotonic(), recovered)


def _until(transcript: Transcript, happened: Callable[[list[Line]], bool], otherwise: str) -> None:
    if not transcript.until(happened, _START_S):
        raise RuntimeError(f"{otherwise}; last said: {[line.text for line in transcript.lines[-5:]]}")


def _all_beside(lines: Sequence[Line]) -> bool:
    """Whether no worker's bytes go in messages any more."""
    beside = [line.who for line in lines if line.deed is not None and line.deed.beside]
    return all(beside.count(who) >= _ROUNDS_BEFORE for who in _WORKERS)


def _recovered_at_s(lines: Sequence[Line], over_s: float) -> float | None:
    """When every worker had made a round, and the reader a pull, that began after the fault."""
    ends_s = []
    for who in [*_WORKERS, "reader"]:
        deeds = [line.deed for line in lines if line.who == who and line.deed is not None]
        made = [deed.to_s for deed in deeds if deed.from_s >= over_s and deed.error is None]
        if not made:
            return None
        ends_s.append(made[0])
    return max(ends_s)


def evaluate(fault: str, lines: Sequence[Line], from_s: float, over_s: float, now_s: float, recovered: bool) -> Result:
    """The row of a fault that lasted from ``from_s`` to ``over_s``, by the reports until ``now_s``."""
    end_s = (_recovered_at_s(lines, over_s) or now_s) if recovered else now_s
    # No round waits for the reader.
    told_s = [line.at_s for line in lines if line.who != "reader" and from_s <= line.at_s <= end_s]
    moments_s = [from_s, *told_s, end_s]
    silence_s = max(after_s - before_s for before_s, after_s in itertools.pairwise(moments_s))
    waits = list[tuple[float, str, float, bool]]()
    for who in [*_WORKERS, "reader"]:
        deeds = [line.deed for line in lines if line.who == who and line.deed is not None]
        waits += [(deed.to_s - deed.from_s, who, deed.to_s, True) for deed in deeds if deed.to_s >= from_s]
        if not recovered:  # it is still waiting
            waits.append((now_s - max(deed.to_s for deed in deeds), who, now_s, False))
    wait_s, who, to_s, ended = max(waits)
    said = [
        line.text
        for line in lines
        if line.who == who and to_s - wait_s <= line.at_s <= to_s + 0.1 and line.text and line.deed is None
    ]
    deeds = [line.deed for line in lines if line.deed is not None and line.deed.to_s >= from_s]
    return Result(
        fault=fault,
        lasted_s=over_s - from_s,
        silence_s=silence_s,
        wait_s=wait_s,
        who=who,
        said=said[-1] if said else "",
        ended=ended,
        recovered_after_s=end_s - over_s if recovered else None,
        errors=sum(deed.error is not None for deed in deeds),
        right=all(deed.right for deed in deeds),
    )


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    shown = Table(title=f"rounds of {WORKERS} workers, {PARAMETERS:,} float32 parameters", show_lines=True)
    for column in ("fault", "s", "silence s", "wait s", "whose", "said last", "goes on after s", "errors", "right"):
        shown.add_column(column, justify="left" if column in ("fault", "said last", "whose") else "right")
    for r in results:
        shown.add_row(
            r.fault,
            f"{r.lasted_s:.0f}",
            f"{r.silence_s:.1f}",
            f"{r.wait_s:.1f}{'' if r.ended else ', no end'}",
            r.who,
            r.said if len(r.said) <= _SHOWN else r.said[:_SHOWN] + "...",
            "never" if r.recovered_after_s is None else f"{r.recovered_after_s:.1f}",
            str(r.errors),
            "yes" if r.right else "NO",
        )
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.waits", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter faults")
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose name has this text")
    parser.add_argument("--verbose", action="store_true", help="also print what was logged during the faults")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-waits.json"), help="results (%(default)s)")
    parser.add_argument("--seat", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.seat is not None:
        play(Seat(**json.loads(arguments.seat)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is undone first
    reason = unavailable_because()
    if reason is not None:
        print(f"bench.waits: skipped: {reason}")
        return 0
    console, results = Console(width=160), []
    for fault in (fault for fault in FAULTS if arguments.only in fault.name):
        console.print(fault.name, style="dim")
        transcript = Transcript()
        try:
            results.append(measure(fault, fault.quick_s if arguments.quick else fault.lasts_s, transcript))
        except (RuntimeError, OSError) as error:
            print(f"bench.waits: {fault.name}: {error}", file=sys.stderr)
            return 1
        if arguments.verbose:
            for line in transcript.lines:
                console.print(f"{line.at_s - transcript.lines[0].at_s:8.2f} {line.who}: {line.text}", markup=False)
    console.print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
