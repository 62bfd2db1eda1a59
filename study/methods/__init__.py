"""Ways to train with several workers, by name. To add one, write it in its own file (see `base.Method`) and add a line
to `METHODS`."""

from __future__ import annotations

from collections.abc import Callable

from study.arm import Arm
from study.methods.alone import AloneMethod
from study.methods.base import Method
from study.methods.rounds import RoundsMethod
from study.methods.synchronous import SynchronousMethod
from study.tasks.base import LearningTask

__all__ = ["METHODS", "Method"]

METHODS: dict[str, Callable[[LearningTask, Arm], Method]] = {
    "rounds": RoundsMethod,
    "synchronous": SynchronousMethod,
    "alone": AloneMethod,
}
