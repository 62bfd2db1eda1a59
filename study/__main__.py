"""Loss and bytes of this project beside synchronous training: `python -m study`, or `make study`.

Every arm of `study.plan` is tuned with a seed of its own and then trained with three others, in as many processes as
there are processors. Each finished training is kept; the same command makes those that are missing. The full study
takes about two hours on two free processors.

    python -m study                  trains what is missing and prints the result
    python -m study --extended       further arms, too (half an hour more)
    python -m study --quick          few steps, in a directory of its own (three minutes): what it does
    python -m study --list           the plan, and what is missing
    python -m study --page           writes docs/study.md from what is kept, and trains nothing; other arms stay as
                                     the page has them
    python -m bench.study_links      measures steps over links, for the page (root on Linux)
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modelaverage.commands import flag_types
from study.arm import Arm
from study.compare import shown
from study.crew import make_all, pool, processors, train_and_keep
from study.kept import KeptArms
from study.links import LinkTimes, link_times_path, times_to_loss
from study.numbers import StudyNumbers
from study.page import write_page
from study.plan import EXTENDED, FULL, QUICK, StudyPlan
from study.results import ArmResult, results_of
from study.standing import StudyStanding, standing_of
from study.tasks import TASKS
from study.tuning import rate_at

__all__ = ["main"]

_DOCS = Path("docs")


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--quick", action="store_true", help="few arms and steps, and one seed")
    plans.add_argument(
        "--extended", action="store_true", help="further arms, too; the page always shows those that exist"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--list", action="store_true", help="only print the plan and what is missing")
    choice.add_argument("--page", action="store_true", help="only write the page; with --quick beside its trainings")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--processes", type=flag_types.count, default=processors(), metavar="N", help="(%(default)s, the processors)"
    )
    arguments = parser.parse_args(argv)
    plan = QUICK if arguments.quick else EXTENDED if arguments.extended or arguments.page else FULL
    directory: Path = arguments.runs / "quick" if arguments.quick else arguments.runs
    console = Console()
    try:
        sources = {task: TASKS[task]().source for task in plan.tasks}
        standing = functools.partial(standing_of, plan, KeptArms(directory), sources)
        if arguments.list:
            _print_plan(standing(), console)
        elif arguments.page:
            written = _write_page(standing(), sources, directory, directory if arguments.quick else _DOCS)
            console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
        else:
            with pool(arguments.processes) as executor:
                train = functools.partial(train_and_keep, directory)
                make_all(standing, train, functools.partial(_named, plan), executor, arguments.processes, console)
            _print_results(results_of(standing()), console)
            console.print(
                f"data: {'; '.join(sources.values())}\n`--page` writes the page with tables and pictures",
                soft_wrap=True,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; finished trainings are in {directory}, and the same command goes on", soft_wrap=True)
        return 130
    except BrokenExecutor:
        print(
            "study: a process was killed while it trained; is there enough memory? The same command goes on",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    return 0


def _write_page(now: StudyStanding, sources: Mapping[str, str], runs: Path, into: Path) -> list[Path]:
    """Arms and times that are missing on disk stay as the page has them. Raises OSError and ValueError."""
    kept = StudyNumbers.load(into / "study" / "study.json") or StudyNumbers(sources, ())
    results = results_of(now, lambda planned: kept.of_plan(planned, sources))
    names = {each.name for each in results}
    earlier = [each.planned.name for each in now.arms if each.trainings_ahead and each.planned.name in names]
    unfinished = [each.planned.name for each in now.arms if each.planned.name not in names]
    links = _link_times(runs) or kept.links
    to_loss = () if links is None else times_to_loss(results, links)
    return write_page(StudyNumbers(sources, results, unfinished, links, to_loss), into, earlier)


def _link_times(runs: Path) -> LinkTimes | None:
    """What `bench.study_links` has written; None: it was not run. Raises OSError and ValueError."""
    try:
        return LinkTimes.load(link_times_path(runs))
    except FileNotFoundError:
        return None


def _named(plan: StudyPlan, arm: Arm) -> str:
    name = next(each.name for each in plan.arms if each.with_rate(arm.learning_rate, arm.seed) == arm)
    seed = "tuning" if arm.seed == plan.tuning_seed else f"seed {arm.seed}"
    return f"{name}, rate {arm.learning_rate:g}, {seed}"


def _print_plan(standing: StudyStanding, console: Console) -> None:
    table = Table(caption="learning rates tried, with their held-out losses in nats", caption_justify="left")
    for title in ("arm", "steps", "learning rates tried", "tuned", "seeds", "missing"):
        table.add_column(title, justify="right" if title in ("steps", "missing") else "left")
    for each in standing.arms:
        tried = [f"{rate_at(rung):g}: {found.last.held_out_loss:.4f}" for rung, found in sorted(each.tuning.items())]
        tuned = "" if each.rung is None else f"{rate_at(each.rung):g}"
        seeds, ahead = ", ".join(map(str, each.finished)), str(each.trainings_ahead or "")
        table.add_row(each.planned.name, str(each.planned.template.steps), "\n".join(tried), tuned, seeds, ahead)
    console.print(table)
    cost = (
        "" if standing.batch_s is None else f", {standing.batch_s * standing.batches_ahead / 3600:.1f} processor hours"
    )
    console.print(
        f"{standing.trainings_done} trainings are there, at least {standing.trainings_ahead} are missing "
        f"({standing.batches_ahead:,} batches{cost})",
        soft_wrap=True,
        highlight=False,
    )


def _print_results(results: list[ArmResult], console: Console) -> None:
    table = Table(caption="nats, +- the standard deviation over the seeds", caption_justify="left")
    for title in ("arm", "held-out loss", "from synchronous", "of its bytes", "learning rate"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for each in results:
        part = f"1/{1 / each.bytes_part:.0f}" if each.bytes_part else "0"
        difference = shown(each.difference_percent, each.difference_spread, "+", digits=2) + " %"
        loss = shown(each.held_out_loss, each.held_out_spread)
        table.add_row(each.name, loss, difference, part, f"{each.learning_rate:g}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
