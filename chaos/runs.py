"""A run without faults, then one with faults, and what is printed of both."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from chaos import cluster, log
from chaos.faults import sequence
from chaos.picture import draw
from chaos.report import Report, judge, table
from chaos.worker import NO_COMPRESSION
from modelaverage.outer import AVERAGE, OuterOptimizer

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What to do.

    Args:
        workers: how many.
        rounds: planned.
        seed: of the faults.
        squeeze: whether the server also runs out of descriptors and threads now and then.
        faults_every_s: the time from one fault to the next.
        accuracy_points: by how many percentage points the test accuracy may differ from that of a run without faults.
        json: where the report goes; the picture goes beside it.
        outer: the outer optimizer that the chief names.
        compression: the codec that it names.
    """

    workers: int
    rounds: int
    seed: int
    squeeze: bool
    faults_every_s: float
    accuracy_points: float
    json: Path
    outer: OuterOptimizer = AVERAGE
    compression: str = NO_COMPRESSION


def run(settings: Settings) -> bool:
    """Makes both runs. Returns whether all checks passed."""
    console = Console(width=120)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        report = _both(settings, directory, console)
    except KeyboardInterrupt:
        shutil.rmtree(directory)
        raise
    picture = settings.json.with_suffix(".png")
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    draw(report, picture)
    console.print(table(report))
    console.print(f"written: {settings.json}, {picture}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"FAILED: {problem}", style="bold red", markup=False)
    if report.problems:
        console.print(f"kept: {directory}, with all that was pushed, received and printed", soft_wrap=True)
        return False
    shutil.rmtree(directory)
    console.print("nothing was lost, nothing counted twice", style="bold green")
    return True


def _both(settings: Settings, directory: Path, console: Console) -> Report:
    plan = cluster.Plan(
        settings.workers,
        settings.rounds,
        directory / "calm",
        outer=settings.outer,
        compression=settings.compression,
    )
    console.print("without faults:", style="dim")
    calm = cluster.run(plan, iter(()), _progress(console))
    plan = replace(plan, directory=directory / "struck", squeezes=settings.squeeze)
    processes = [cluster.SERVER, *cluster.workers_of(plan.workers)]
    console.print(f"with a fault every {settings.faults_every_s:g} s, seed {settings.seed}:", style="dim")
    squeezed = cluster.SERVER if settings.squeeze else None
    faults = sequence(settings.seed, processes, settings.faults_every_s, squeezed)
    course = cluster.run(plan, faults, _progress(console))
    if course.lacks_limit:
        console.print(course.lacks_limit, style="dim", markup=False)
    return judge(plan, settings.seed, course, log.read(plan.directory), calm, settings.accuracy_points)


def _progress(console: Console) -> Callable[[int, int], None]:
    began_at_s = time.monotonic()

    def show(global_step: int, faults: int) -> None:
        elapsed_s = time.monotonic() - began_at_s
        console.print(f"{elapsed_s:5.0f} s  global_step {max(0, global_step)}, {faults} faults", highlight=False)

    return show
