"""Makes the missing trainings of a study with several processes. Each training is kept as soon as it is finished."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from study.arm import Arm
from study.kept import KeptArms, Training
from study.play import play
from study.standing import StudyStanding
from study.tasks import TASKS, LearningTask

__all__ = ["make_all", "pool", "processors", "train_and_keep"]

_REFRESH_S = 1.0


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(processes: int) -> Iterator[Executor]:
    """Processes that give way to all other work. If the context ends with an error, their trainings are broken off, and
    they end when this process does, however it ends."""
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)
    before = set(multiprocessing.active_children())
    try:
        yield executor
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def train_and_keep(directory: Path, arm: Arm) -> float:
    """One training, kept in the directory; returns its last held-out loss, in nats."""
    task, began_s = _task(arm.task), time.monotonic()
    measured = tuple(play(task, arm))
    training = Training(arm, task.source, time.monotonic() - began_s, measured)
    KeptArms(directory).keep(training)
    return training.last.held_out_loss


def make_all(
    standing: Callable[[], StudyStanding],
    train: Callable[[Arm], float],
    names: Callable[[Arm], str],
    executor: Executor,
    processes: int,
    console: Console,
) -> None:
    """Trains until nothing is missing.

    Args:
        standing: reads what is on disk; asked again after every training.
        train: makes and keeps one, in a process of ``executor``; returns its loss. What it raises ends all.
        names: what to call a training.
        executor: of ``processes`` processes.
        console: shows progress.
    """
    running = dict[Future[float], Arm]()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("trainings", total=None, said="")
        while True:
            now = standing()
            free = [arm for arm in now.missing if arm not in running.values()]
            for arm in free[: processes - len(running)]:
                running[executor.submit(train, arm)] = arm
            total = now.trainings_done + now.trainings_ahead
            progress.update(bar, completed=now.trainings_done, total=total, said=_said(now, processes))
            if not running:
                return
            done = set[Future[float]]()
            while not done:
                done, _ = wait(running, timeout=_REFRESH_S, return_when=FIRST_COMPLETED)
            for future in done:
                arm = running.pop(future)
                console.print(f"{names(arm)}: held-out loss {future.result():.4f}", highlight=False, soft_wrap=True)


def _said(now: StudyStanding, processes: int) -> str:
    counts = f"{now.trainings_done} of at least {now.trainings_done + now.trainings_ahead}"
    if now.batch_s is None or not now.trainings_ahead:
        return counts
    minutes = now.batch_s * now.batches_ahead / processes / 60
    return f"{counts}, about {minutes // 60:.0f} h {minutes % 60:02.0f} min left"


def _begin() -> None:
    """In a new process of the pool."""
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process ends the others

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def _task(name: str) -> LearningTask:
    return TASKS[name]()
