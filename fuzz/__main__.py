"""Throws hostile input at every message handler of the server: `make fuzz`, or `python -m fuzz --help`."""

from __future__ import annotations

import argparse
import sys

from fuzz.run import Result, run
from fuzz.targets import TARGETS, target_named


def main(arguments: list[str] | None = None) -> int:
    """Runs the targets one after the other; returns 1 if any of them found something."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for every handler (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other inputs (default: %(default)s)")
    parser.add_argument("--handler", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--number", type=int, help="plays this input again, after the earlier ones of its service")
    flags = parser.parse_args(arguments)
    results = []
    for name in flags.handler or TARGETS:
        target = target_named(name, flags.seed)
        first, inputs = 0, -(-flags.inputs // target.inputs_each)
        if flags.number is not None:
            first, inputs = flags.number, 1
        results.append(run(target, inputs, first, _show_progress))
        for found in results[-1].failures:
            print(f"FAILED: python -m fuzz --seed {flags.seed} --handler {name} --number {found.number}\n{found.what}")
    _show(results)
    return int(any(result.failures for result in results))


def _show_progress(result: Result) -> None:
    failures = f", {len(result.failures)} FAILURES" if result.failures else ""
    print(f"{result.name}: {result.inputs} inputs, {result.rate:.0f}/s{failures}", flush=True)


def _show(results: list[Result]) -> None:
    print(f"\n{'handler':16}{'inputs':>10}{'inputs/s':>10}{'slowest ms':>12}{'memory MiB':>12}{'failures':>10}")
    for result in results:
        growth = f"{result.growth_bytes / 2**20:+.1f}"
        print(
            f"{result.name:16}{result.inputs:10}{result.rate:10.0f}{1e3 * result.slowest_s:12.0f}"
            f"{growth:>12}{len(result.failures):10}"
        )
    for result in results:
        endings = ", ".join(f"{name} {count}" for name, count in result.endings.most_common())
        tables = ", ".join(f"{name} {count}" for name, count in result.tables.most_common())
        print(f"\n{result.name} ended with: {endings}")
        print(f"{result.name} left in tables of one service at most: {tables or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
