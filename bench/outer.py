"""The outer optimizer on the digits beside plain averages and lone workers: mean and spread over seeds, from whole runs
with a parameter server and worker processes.

    python -m bench.outer                                        seeds 0, 1 and 2 with the demo's settings: two minutes
    python -m bench.outer --workers 4 -- --outer adam:lr=0.01    other settings, as `ma-launch -- digits` takes them
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelaverage.commands import flag_types

__all__ = ["main", "table"]

_ARMS = {"center": "outer optimizer", "plain": "plain average", "alone": "alone", "all": "alone, all images"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.outer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=flag_types.count, default=3, metavar="N", help="from 0 on (%(default)s)")
    parser.add_argument("--workers", type=flag_types.count, default=2, metavar="N", help="of a run (%(default)s)")
    parser.add_argument("digits", nargs="*", metavar="-- FLAG", help="more flags of `ma-launch -- digits`")
    arguments = parser.parse_args(argv)
    found = list[dict[str, Any]]()
    for seed in range(arguments.seeds):
        try:
            found.append(_run(arguments.workers, [*arguments.digits, f"--seed={seed}"]))
        except subprocess.CalledProcessError as error:
            print(f"bench.outer: seed {seed}: {error.stderr.strip() or error}", file=sys.stderr)
            return 1
        print("\n".join(table(found[-1:])), flush=True)
    print("\n".join(table(found)))
    return 0


def _run(num_workers: int, flags: Sequence[str]) -> dict[str, Any]:
    """The summary of a run. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "ps_worker.launch", "--workers", str(num_workers), "--runs", runs]
        subprocess.run([*command, "--", "digits", *flags], check=True, capture_output=True, text=True)
        (summary,) = Path(runs).glob("*/summary.json")
        read: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return read


def table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines: what was run, then accuracy and loss of each arm, with the standard deviation over the seeds."""
    config = summaries[0]["config"]
    seeds = ", ".join(str(summary["config"]["seed"]) for summary in summaries)
    lines = [
        f"{summaries[0]['num_workers']} workers, {config['steps']} steps, a round every {config['interval_steps']}, "
        f"learning rate {config['learning_rate']:g}, {config['outer']}; seed {seeds}"
    ]
    for arm, title in _ARMS.items():
        if summaries[0][f"{arm}_accuracy"] is None:  # there was no such arm
            continue
        shown = [f"{what} {_spread([each[f'{arm}_{what}'] for each in summaries])}" for what in ("accuracy", "loss")]
        lines.append(f"{title:<18} {'   '.join(shown)}")
    return lines


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    sys.exit(main())
