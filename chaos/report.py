"""A run in numbers, and the problems that were found."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from chaos.cluster import SERVER, Course, Plan, workers_of
from chaos.coding import Coding
from chaos.faults import SQUEEZES, Fault, Kind
from chaos.log import Log
from chaos.replay import replay
from chaos.worker import NO_COMPRESSION, accuracy_of
from modelaverage.codecs import codec_named

__all__ = ["Report", "Round", "judge", "table"]

_LONGEST_STRETCH_S = 30.0
_SQUEEZED: dict[Kind, str] = {"descriptors": "out of descriptors", "threads": "out of threads"}


@dataclass(frozen=True)
class Round:
    """When a round's center first came to a worker, in seconds from the start of the run."""

    global_step: int
    at_s: float


@dataclass(frozen=True)
class Report:
    """One run.

    Args:
        workers: how many.
        rounds: planned.
        seed: of the faults.
        problems: what is wrong; empty if nothing is.
        global_step: at the end.
        took_s: from the start of the processes to the last worker's end.
        undisturbed_s: the same, without faults.
        rounds_explained: the rounds whose center is, to the bit, the average of one push of each worker.
        rounds_with_a_choice: those of them for which some worker had logged pushes that differ.
        pushes: the number of logged pushes.
        pushes_not_counted: those that are in no center.
        outcomes: what workers were told about their pushes; "none": the process ended before.
        calls_tried_again: by the workers' sessions.
        rounds_started_over: by the server.
        longest_stretch_s: without a round.
        accuracy: of the last center on the test images.
        undisturbed_accuracy: of that of a run without faults.
        starts: processes, by name.
        faults: with the times at which they happened.
        squeezed_deaths: how processes that lacked descriptors or threads ended.
        course: the rounds, in order.
    """

    workers: int
    rounds: int
    seed: int
    problems: list[str]
    global_step: int
    took_s: float
    undisturbed_s: float
    rounds_explained: int
    rounds_with_a_choice: int
    pushes: int
    pushes_not_counted: int
    outcomes: dict[str, int]
    calls_tried_again: int
    rounds_started_over: int
    longest_stretch_s: float
    accuracy: float
    undisturbed_accuracy: float
    starts: dict[str, int]
    faults: list[Fault]
    squeezed_deaths: list[str]
    course: list[Round]

    @property
    def processes(self) -> list[str]:
        """The names of the processes, the server first."""
        return [SERVER, *workers_of(self.workers)]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def judge(plan: Plan, seed: int, course: Course, log: Log, calm: Course, accuracy_points: float) -> Report:
    """Checks a run against what its workers logged, and against one without faults.

    Args:
        plan: what was to be run.
        seed: of the faults.
        course: how it went.
        log: what its workers logged.
        calm: how a run without faults went.
        accuracy_points: by how many percentage points the test accuracy may differ from that one's.
    """
    coding = None
    if plan.compression != NO_COMPRESSION and course.manifest is not None:
        coding = Coding(codec_named(plan.compression), course.manifest)
    replayed = replay(log.pushes, log.received, workers_of(plan.workers), plan.rounds, plan.outer, coding)
    rounds = _course(course, log)
    last_s = course.ended_at_s - course.began_at_s
    times_s = [0.0, *(each.at_s for each in rounds), last_s]
    report = Report(
        workers=plan.workers,
        rounds=plan.rounds,
        seed=seed,
        problems=[],
        global_step=course.global_step,
        took_s=last_s,
        undisturbed_s=calm.ended_at_s - calm.began_at_s,
        rounds_explained=replayed.rounds_explained,
        rounds_with_a_choice=replayed.rounds_with_a_choice,
        pushes=len(log.pushes),
        pushes_not_counted=replayed.pushes_not_counted,
        outcomes=dict(Counter(push.told or "none" for push in log.pushes)),
        calls_tried_again=len(log.tried_again),
        rounds_started_over=course.rounds_started_over,
        longest_stretch_s=max(later - earlier for earlier, later in itertools.pairwise(times_s)),
        accuracy=0.0 if course.center is None else accuracy_of(course.center),
        undisturbed_accuracy=0.0 if calm.center is None else accuracy_of(calm.center),
        starts=course.starts,
        faults=[replace(fault, at_s=round(fault.at_s, 2)) for fault in course.struck],
        squeezed_deaths=list(course.squeezed_deaths),
        course=rounds,
    )
    problems = [*replayed.problems, *course.deaths, *_problems(report, course, log, accuracy_points)]
    return replace(report, problems=problems)


def table(report: Report) -> Table:
    """The report as text."""
    shown = Table(title=f"chaos: {report.workers} workers, seed {report.seed}", show_header=False, title_justify="left")
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for label, value in _rows(report):
        shown.add_row(label, value)
    return shown


def _rows(report: Report) -> list[tuple[str, str]]:
    def each(kind: Kind) -> str:
        count = Counter(fault.process for fault in report.faults if fault.kind == kind)
        by_process = ", ".join(f"{name} {count[name]}" for name in report.processes)
        return f"{count.total()} ({by_process})"

    squeezes = [(_SQUEEZED[kind], each(kind)) for kind in SQUEEZES if any(f.kind == kind for f in report.faults)]
    if squeezes:
        squeezes.append(("ended while it lacked them", "; ".join(report.squeezed_deaths) or "never"))
    restarts = {name: report.starts[name] - 1 for name in report.processes}
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in sorted(report.outcomes.items()))
    points = 100 * (report.accuracy - report.undisturbed_accuracy)
    return [
        ("global_step", f"{report.global_step} of {report.rounds}"),
        ("rounds explained to the bit", f"{report.rounds_explained}, {report.rounds_with_a_choice} with a choice"),
        ("pushes logged", f"{report.pushes}, {report.pushes_not_counted} not counted"),
        ("told", outcomes),
        ("killed", each("kill")),
        ("stopped", each("stop")),
        *squeezes,
        ("restarts", f"{sum(restarts.values())} ({', '.join(f'{name} {n}' for name, n in restarts.items())})"),
        ("calls tried again", str(report.calls_tried_again)),
        ("rounds started over", str(report.rounds_started_over)),
        ("longest time without a round", f"{report.longest_stretch_s:.1f} s"),
        ("time", f"{report.took_s:.1f} s; without faults {report.undisturbed_s:.1f} s"),
        (
            "test accuracy",
            f"{report.accuracy:.4f}; without faults {report.undisturbed_accuracy:.4f} ({points:+.2f} points)",
        ),
    ]


def _course(course: Course, log: Log) -> list[Round]:
    first_s = dict[int, float]()
    for received in log.received:
        first_s.setdefault(received.global_step, received.at_s - course.began_at_s)
    return [Round(step, round(at_s, 3)) for step, at_s in sorted(first_s.items()) if step > 0]


def _problems(report: Report, course: Course, log: Log, accuracy_points: float) -> list[str]:
    problems = list[str]()
    if course.gave_up:
        problems.append(course.gave_up)
    if report.longest_stretch_s > _LONGEST_STRETCH_S:
        problems.append(f"{report.longest_stretch_s:.1f} s went by without a round")
    if course.center is None:
        return problems
    if report.global_step != report.rounds:
        problems.append(f"the server is at global_step {report.global_step}, {report.rounds} were planned")
    received = [each.values for each in log.received if each.global_step == report.global_step]
    if not any(np.array_equal(values, course.center) for values in received):
        problems.append("the server's last center is not what the workers received")
    if 100 * abs(report.accuracy - report.undisturbed_accuracy) > accuracy_points + 1e-9:
        problems.append(f"the accuracy differs by more than {accuracy_points:g} points from a run without faults")
    return problems
