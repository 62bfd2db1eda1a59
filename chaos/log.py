"""The workers' records, from which a run can be replayed: every push before it is made, and every center.

In a directory, `values/` has the float32 values of the pushes and centers; the files' names have their hash, so equal
values are one file. `events/` has JSON lines, one file for each process. Everything that a process wrote survives its
SIGKILL, except an incomplete last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Log",
    "Push",
    "Received",
    "TriedAgain",
    "Values",
    "WorkerLog",
    "flat",
    "newest_checkpoint",
    "newest_step",
    "read",
]

Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Push:
    """What a worker was about to push.

    Args:
        worker: its id.
        process: the number of this process among those of the worker, from 1.
        number: the number of this push among those of the process, from 1.
        base_step: the step of the center that it was trained from.
        values: all variables, one after the other.
        told: the outcome that the worker was told; None if the process ended before.
    """

    worker: str
    process: int
    number: int
    base_step: int
    values: Values
    told: str | None


@dataclass(frozen=True, eq=False)
class Received:
    """A center that a worker received.

    Args:
        worker: its id.
        process: the number of the process among those of the worker, from 1.
        at_s: when, on the monotonic clock that all processes of a machine share.
        global_step: the center's.
        values: all variables, one after the other.
        contributors: the workers of whose pushes it is the average; None: it was pulled, so the worker was not told.
    """

    worker: str
    process: int
    at_s: float
    global_step: int
    values: Values
    contributors: tuple[str, ...] | None


@dataclass(frozen=True)
class TriedAgain:
    """A call of a worker's session that failed and was repeated until it was answered.

    Args:
        worker: its id.
        at_s: when it failed first.
        why: what the session logged.
    """

    worker: str
    at_s: float
    why: str


@dataclass(frozen=True)
class Log:
    """All that the workers of a run wrote down."""

    pushes: tuple[Push, ...]
    received: tuple[Received, ...]
    tried_again: tuple[TriedAgain, ...]


class WorkerLog:
    """What one process of a worker writes down.

    Args:
        directory: of the run's log.
        worker: its id.
        process: the number of the process among those of the worker, from 1.
    """

    def __init__(self, directory: Path, worker: str, process: int) -> None:
        self._values, events = directory / "values", directory / "events"
        for folder in (self._values, events):
            folder.mkdir(parents=True, exist_ok=True)
        self._who = {"worker": worker, "process": process}
        self._events = events / f"{worker}.{process}.jsonl"
        self._append(kind="begins")

    def pushing(self, number: int, base_step: int, values: Values) -> None:
        """Logs the push; returns when it is on file and may be made."""
        name = self._keep(f"push-{base_step:06d}", values)
        self._append(kind="pushing", number=number, base_step=base_step, values=name)

    def answered(
        self, number: int, outcome: str, global_step: int, contributors: tuple[str, ...], values: Values
    ) -> None:
        """Logs that the push ended with this center."""
        self._append(kind="told", number=number, outcome=outcome)
        name = self._keep(f"center-{global_step:06d}", values)
        self._append(kind="received", global_step=global_step, values=name, contributors=contributors)

    def pulled(self, global_step: int, values: Values) -> None:
        """Logs a pulled center."""
        name = self._keep(f"center-{global_step:06d}", values)
        self._append(kind="received", global_step=global_step, values=name, contributors=None)

    def tried_again(self, why: str) -> None:
        """Logs that a call is repeated."""
        self._append(kind="tried again", why=why)

    def _keep(self, prefix: str, values: Values) -> str:
        name = f"{prefix}-{hashlib.sha256(values.tobytes()).hexdigest()[:16]}.npy"
        path = self._values / name
        if not path.exists():
            # Renamed once it is complete; a process that is killed before leaves a file that nothing reads.
            beside = path.with_suffix(f".{os.getpid()}")
            with beside.open("wb") as file:
                np.save(file, values)
            beside.replace(path)
        return name

    def _append(self, **event: object) -> None:
        line = json.dumps({**self._who, "at_s": time.monotonic(), **event})
        with self._events.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")


def flat(variables: Mapping[str, NDArray[Any]]) -> Values:
    """All variables, one after the other, sorted by name."""
    return np.concatenate([np.asarray(variables[name], np.float32).reshape(-1) for name in sorted(variables)])


def newest_step(directory: Path) -> int:
    """The largest `global_step` of a center that a worker has received so far; -1 if there is none."""
    names = (path.name for path in (directory / "values").glob("center-*.npy"))
    return max((int(name.split("-")[1]) for name in names), default=-1)


def newest_checkpoint(directory: Path) -> int:
    """The largest `global_step` of a checkpoint that a server has written there; -1 if there is none."""
    names = (path.name for path in directory.glob("center-*.safetensors"))
    return max((int(name.partition(".")[0].removeprefix("center-")) for name in names), default=-1)


def read(directory: Path) -> Log:
    """Everything, in the order in which it happened."""
    events = list[dict[str, Any]]()
    for path in (directory / "events").glob("*.jsonl"):
        whole, _, _ = path.read_text().rpartition("\n")  # without the line that a killed process left incomplete
        events += [json.loads(line) for line in whole.splitlines()]
    events.sort(key=lambda event: event["at_s"])
    told = {_push_of(event): event["outcome"] for event in events if event["kind"] == "told"}
    arrays = dict[str, Values]()

    def values(event: Mapping[str, Any]) -> Values:
        name = event["values"]
        if name not in arrays:
            arrays[name] = np.load(directory / "values" / name)
        return arrays[name]

    return Log(
        tuple(
            Push(e["worker"], e["process"], e["number"], e["base_step"], values(e), told.get(_push_of(e)))
            for e in events
            if e["kind"] == "pushing"
        ),
        tuple(
            Received(
                e["worker"],
                e["process"],
                e["at_s"],
                e["global_step"],
                values(e),
                None if e["contributors"] is None else tuple(e["contributors"]),
            )
            for e in events
            if e["kind"] == "received"
        ),
        tuple(TriedAgain(e["worker"], e["at_s"], e["why"]) for e in events if e["kind"] == "tried again"),
    )


def _push_of(event: Mapping[str, Any]) -> tuple[str, int, int]:
    return event["worker"], event["process"], event["number"]
