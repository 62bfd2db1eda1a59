"""A round of this checkout beside a round of another one, such as an older version: `python -m bench.versions ../base`.

Servers and workers of both versions run at once on this machine, each with the code of its own checkout, and take turns
round by round, so that noise of the machine meets both. The slowest worker's time counts, and every element of the
center is checked. Two neighbouring rounds, one of each version, make a pair; the interval is where the median of the
pairs' ratios lies (bootstrap). All processes are started several times: one start may be faster than the next by more
than the versions differ.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import Popen

from rich.console import Console
from rich.table import Table

from bench.processes import parameter_server, running
from bench.round import TRANSPORTS
from modelaverage.commands import flag_types

__all__ = ["Case", "Result", "interval_of_median", "main", "measure", "table"]

HERE = Path(__file__).resolve().parents[1]
WORKERS = 2
PARAMETERS = (1_000, 1_000_000, 10_000_000)
"""Float32, of the model."""
_WARM_UPS = 3
_RESAMPLES = 1_000
# Without one of these, Python would take the package from where it is installed: another version than asked for.
_NEEDED = ("ma_client/__init__.py", "ps_server/__main__.py", "proto/modelaverage/__init__.py")
_EXAMPLE = """
example: what have the last ten commits changed?
  git worktree add --detach ../base HEAD~10
  python -m bench.versions ../base --transport tcp "unix socket" --parameters 1000000
"""


@dataclass(frozen=True)
class Case:
    """One row: how the bytes travel, and how many float32 parameters."""

    transport: str
    parameters: int


@dataclass(frozen=True)
class Result:
    """One row of the table: medians, their ratio (this checkout's by the other's), and where the median of the paired
    ratios lies with 95 % confidence."""

    transport: str
    parameters: int
    starts: int
    rounds: int
    other_ms: float
    here_ms: float
    ratio: float
    paired_low: float
    paired_high: float


class _Side:
    """One version's server and workers; ``stack`` ends them. Raises RuntimeError if one of them fails."""

    def __init__(self, checkout: Path, case: Case, stack: ExitStack) -> None:
        self._checkout = checkout
        flags = ("--data-port", "off") if case.transport.endswith(", messages") else ()
        is_unix = case.transport == "unix socket"
        server = parameter_server(WORKERS, *flags, unix_socket=is_unix, checkout=checkout)
        try:
            address, _ = stack.enter_context(server)
        except RuntimeError as error:
            raise RuntimeError(f"{checkout}: {error}") from None
        program = str(Path(__file__).with_name("version_worker.py").resolve())
        self._workers = list[Popen[str]]()
        for rank in range(WORKERS):
            arguments = (str(rank), str(WORKERS), address, case.transport, str(case.parameters))
            self._workers.append(stack.enter_context(running([sys.executable, program, *arguments], checkout)))
        self._answers()

    def round_s(self) -> float:
        """Takes a turn: the seconds of a round of the slowest worker."""
        for worker in self._workers:
            assert worker.stdin is not None
            print("go", file=worker.stdin, flush=True)
        answers = self._answers()
        complaints = [answer for answer in answers if answer.startswith("worker-")]
        if complaints:
            raise RuntimeError(f"{self._checkout}: {'; '.join(complaints)}")
        return max(float(answer) for answer in answers)

    def _answers(self) -> list[str]:
        """A line from each worker. A worker that has ended is noticed while another still waits for it."""
        outputs = {worker.stdout.fileno(): worker.stdout for worker in self._workers if worker.stdout is not None}
        answers = list[str]()
        while outputs:
            for number in wait(list(outputs)):
                assert isinstance(number, int)
                answer = outputs.pop(number).readline()
                if not answer:
                    raise RuntimeError(f"{self._checkout}: a worker has ended; standard error says why")
                answers.append(answer.strip())
        return answers


def measure(case: Case, other: Path, starts: int, rounds: int) -> Result:
    """Runs one row. Raises RuntimeError if a process of either version fails, or if a center is wrong."""
    other_s, here_s, ratios = list[float](), list[float](), list[list[float]]()
    for start in range(starts):
        order = -1 if start % 2 else 1  # which version's processes are started first
        others_s, ours_s = _take_turns(case, (other, HERE)[::order], rounds)[::order]
        other_s += others_s
        here_s += ours_s
        ratios.append([ours / others for ours, others in zip(ours_s, others_s, strict=True)])
    other_ms, here_ms = 1e3 * statistics.median(other_s), 1e3 * statistics.median(here_s)
    low, high = interval_of_median(ratios)
    return Result(case.transport, case.parameters, starts, rounds, other_ms, here_ms, here_ms / other_ms, low, high)


def _take_turns(case: Case, checkouts: Sequence[Path], rounds: int) -> list[list[float]]:
    """Starts the two versions once: the seconds of the rounds of each."""
    with ExitStack() as stack:
        sides = [_Side(checkout, case, stack) for checkout in checkouts]
        times_s = [list[float]() for _ in sides]
        for number in range(_WARM_UPS + rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                times_s[index].append(sides[index].round_s())
    return [taken_s[_WARM_UPS:] for taken_s in times_s]


def interval_of_median(starts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence. Resamples the starts, then the values of each: those of one start
    resemble each other. The same values always give the same interval."""
    draw = random.Random(0)

    def resampled() -> float:
        chosen = draw.choices(starts, k=len(starts))
        return statistics.median(value for values in chosen for value in draw.choices(values, k=len(values)))

    medians = sorted(resampled() for _ in range(_RESAMPLES))
    outside = round(0.025 * _RESAMPLES)
    return medians[outside], medians[-1 - outside]


def table(results: Sequence[Result], other: Path) -> Table:
    """The results for people."""
    shown = Table(title=f"a round here beside {other}; a ratio below 1: faster here")
    for column in ("transport", "parameters", "other ms", "here ms", "ratio", "95 % of paired ratios"):
        shown.add_column(column, justify="right")
    for r in results:
        shown.add_row(
            r.transport,
            f"{r.parameters:,}",
            f"{r.other_ms:.2f}",
            f"{r.here_ms:.2f}",
            f"{r.ratio:.3f}",
            f"{r.paired_low:.3f} to {r.paired_high:.3f}",
        )
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.versions",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="a clone or git worktree")
    parser.add_argument(
        "--starts", type=flag_types.count, default=5, metavar="N", help="more: a narrower interval (%(default)s)"
    )
    parser.add_argument("--rounds", type=flag_types.count, default=8, metavar="N", help="of a start (%(default)s)")
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="only these rows")
    parser.add_argument("--parameters", type=flag_types.count, nargs="+", default=PARAMETERS, metavar="N")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/bench-versions.json"), metavar="FILE", help="results (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    console, results, other = Console(width=160), list[Result](), arguments.other.resolve()
    try:
        lacking = [name for name in _NEEDED if not (other / name).is_file()]
        if lacking:
            raise RuntimeError(
                f"{other} is no checkout of this repository, it has no {lacking[0]}; "
                "make one with `git worktree add --detach PATH COMMIT`"
            )
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        for case in [Case(transport, count) for count in arguments.parameters for transport in arguments.transport]:
            console.print(f"{case.transport}: {case.parameters:,} parameters", style="dim")
            results.append(measure(case, other, arguments.starts, arguments.rounds))
        console.print(table(results, other))
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    except (RuntimeError, OSError) as error:
        print(f"bench.versions: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all processes, as Ctrl-C does
    sys.exit(main())
