"""Makes the trainings of a study that are not on disk yet, and shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from study.kept import KeptArms, Training
from study.play import Arm, play
from study.tasks import LearningTask

__all__ = ["made"]


def made(task: LearningTask, arms: Sequence[Arm], kept: KeptArms, console: Console) -> Iterator[Training]:
    """Trainings from disk where they are there, others made now and kept."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        everything = progress.add_task(task.name, total=len(arms), said="")
        for done, arm in enumerate(arms):
            late = f", {arm.late_steps} steps late: {arm.late_rule}" if arm.late_steps else ""
            rounds = f"{arm.task}, every {arm.interval_steps}{late}, {arm.codec}"
            name = f"{rounds}, rate {arm.learning_rate:g}, seed {arm.seed}"
            training = kept.load(arm, task.source)
            if training is None:
                bar = progress.add_task(name, total=arm.steps, said="")
                began_s, measured = time.monotonic(), []
                for each in play(task, arm):
                    measured.append(each)
                    progress.update(bar, completed=each.step, said=f"held-out loss {each.held_out_loss:.4f}")
                training = Training(arm, task.source, time.monotonic() - began_s, tuple(measured))
                kept.keep(training)
                progress.remove_task(bar)
                loss = f"held-out loss {training.last.held_out_loss:.4f}"
                console.print(f"{name}: {loss}, {training.took_s:.0f} s", highlight=False)
            progress.update(everything, completed=done + 1, said=f"{done + 1} of {len(arms)}")
            yield training
