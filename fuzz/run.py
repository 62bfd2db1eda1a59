"""Plays the inputs of one target, and records their effect on the process."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fuzz.context import Failure
from fuzz.targets import Target
from fuzz.world import open_files, resident_bytes

__all__ = ["Found", "MAX_GROWTH_BYTES", "Result", "run"]

MAX_GROWTH_BYTES = 10 << 20
# The share of the inputs after which the process has reached its final size.
_WARM_UP = 0.1
_MAX_FAILURES = 10
# The server has one event loop: an input that keeps it busy keeps everyone waiting. A hundred times what one needs.
_MAX_INPUT_S = 2.0


@dataclass(frozen=True)
class Found:
    """A failure, and the input that led to it."""

    number: int
    what: str


@dataclass
class Result:
    """The result of a run.

    Attributes:
        slowest_s: processor time of the input that needed most.
        tables: by name, the largest number of entries that a table had gained when a service ended.
    """

    name: str
    inputs: int = 0
    seconds: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    growth_bytes: int = 0
    slowest_s: float = 0.0
    tables: Counter[str] = field(default_factory=Counter)
    failures: list[Found] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Inputs a second of processor time."""
        return self.inputs / self.seconds if self.seconds else 0.0


def run(
    target: Target,
    inputs: int,
    first: int = 0,
    progress: Callable[[Result], None] = lambda _: None,
    progress_every_s: float = 2.0,
) -> Result:
    """Plays ``inputs`` inputs, starting with ``first``, after the earlier inputs of the same world."""
    result = Result(target.name, endings=target.endings)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _play(target, first, first + inputs, result, progress, progress_every_s)
        finally:
            logging.disable(logging.NOTSET)
    return result


def _play(
    target: Target, first: int, end: int, result: Result, progress: Callable[[Result], None], progress_every_s: float
) -> None:
    size = target.inputs_per_world
    warm_at = first + (end - first) * _WARM_UP
    warm_bytes = files = -1
    began_s, shown_s = time.process_time(), time.monotonic()
    for number in range(first - first % size, end):
        try:
            if number % size == 0:
                target.begin(number)
            input_s = time.process_time()
            target.play(number)
            input_s = time.process_time() - input_s
            result.slowest_s = max(result.slowest_s, input_s)
            if input_s > _MAX_INPUT_S:
                raise Failure(f"{target.name} kept the event loop busy for {input_s:.1f} s")
            if (number + 1) % size == 0 or number + 1 == end:
                for name, entries in target.finish().items():
                    result.tables[name] = max(result.tables[name], entries)
        except Exception as error:
            what = str(error) if isinstance(error, Failure) else traceback.format_exc()
            result.failures.append(Found(number, what))
            if len(result.failures) >= _MAX_FAILURES:
                break
            target.begin(number)
        result.inputs += number >= first
        result.seconds = time.process_time() - began_s
        if warm_bytes < 0 and number >= warm_at and (number + 1) % size == 0:
            warm_bytes, files = resident_bytes(), open_files()
        if time.monotonic() - shown_s >= progress_every_s:
            shown_s = time.monotonic()
            progress(result)
    if warm_bytes < 0:
        return
    result.growth_bytes = resident_bytes() - warm_bytes
    if result.growth_bytes > MAX_GROWTH_BYTES:
        result.failures.append(Found(end, f"memory has grown by {result.growth_bytes} bytes since the warm-up"))
    if open_files() > files + 2 * size + 16:
        result.failures.append(Found(end, f"{open_files()} files are open, and {files} were after the warm-up"))
