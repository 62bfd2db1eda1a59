"""Where a worker's events go: to the process that started it, or to the terminal as plain lines."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from modelaverage.commands.columns import fitted
from modelaverage.logs import event, say
from modelaverage.names import shown
from ps_worker.events.parse import AccuracyEvent, Event, StepEvent, encode

__all__ = ["reporter"]

_LINE_INTERVAL_S = 1.0


def reporter(events_fd: int | None, steps: int, as_json: bool = False) -> Callable[[Event], None]:
    """Returns the function that takes the events, for a pipe or for the terminal.

    Args:
        events_fd: where to write JSON lines; None: print plain lines, one a second.
        steps: local steps of the whole training, for the lines.
        as_json: print the lines as JSON objects, like those of the log.

    Raises:
        OSError: nothing can be written to ``events_fd``.
    """
    if events_fd is None:
        return _Lines(steps, as_json).report
    pipe = os.fdopen(events_fd, "w", buffering=1, encoding="utf-8")

    def write(event: Event) -> None:
        pipe.write(encode(event) + "\n")

    return write


class _Lines:
    def __init__(self, steps: int, as_json: bool) -> None:
        self._steps = steps
        self._as_json = as_json
        self._accuracy: float | None = None
        self._printed_at_s = -_LINE_INTERVAL_S

    def report(self, news: Event) -> None:
        if isinstance(news, AccuracyEvent):
            self._accuracy = news.accuracy
        if isinstance(news, StepEvent):
            now_s = time.monotonic()
            if now_s - self._printed_at_s >= _LINE_INTERVAL_S or news.step == self._steps:
                self._printed_at_s = now_s
                if self._as_json:
                    say("ps-worker", True, self._line(news), self._extra(news))
                else:
                    print(self._line(news), flush=True)

    def _extra(self, step: StepEvent) -> dict[str, Any]:
        return event(
            "progress",
            worker=step.worker,
            round=step.global_step,
            local_step=step.step,
            steps=self._steps,
            loss=step.loss,
            samples_per_s=step.samples_per_s,
            waited_s=step.waited_s,
            accuracy=self._accuracy,
        )

    def _line(self, event: StepEvent) -> str:
        parts = [f"{shown(event.worker)}: step {event.step}/{self._steps}", f"loss {event.loss:.4f}"]
        if self._accuracy is not None:
            parts.append(f"test accuracy {self._accuracy:.4f}")
        parts += [f"{event.samples_per_s:.0f} samples/s", f"waited {event.waited_s:.2f} s"]
        parts.append(f"global_step {event.global_step}")
        return fitted(parts, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
