"""Tasks by name. To add one, write it in its own file (see `base.LearningTask`) and add a line to `TASKS`."""

from __future__ import annotations

from collections.abc import Callable

from study.tasks.base import LearningTask, Samples
from study.tasks.digits import DigitsTask
from study.tasks.mnist import MnistTask
from study.tasks.text import TextTask
from study.tasks.text_muon import MuonTextTask

__all__ = ["LearningTask", "Samples", "TASKS"]

TASKS: dict[str, Callable[[], LearningTask]] = {
    each.name: each for each in (DigitsTask, MnistTask, TextTask, MuonTextTask)
}
"""What makes each task; reads its data."""
