"""Tasks by name. To add one, write it in its own file (see `base.LearningTask`) and add a line to `TASKS`."""

from __future__ import annotations

from collections.abc import Callable

from study.tasks.base import LearningTask, Samples
from study.tasks.digits import DigitsTask
from study.tasks.text import TextTask

__all__ = ["LearningTask", "Samples", "TASKS", "TASK_NAMES"]

TASKS: dict[str, Callable[[], LearningTask]] = {DigitsTask.name: DigitsTask, TextTask.name: TextTask}
"""What makes each task; reads its data."""

TASK_NAMES = tuple(TASKS)
