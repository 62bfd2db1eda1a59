"""The events of a run of the built-in workload: a JSON object a line, in a worker's pipe and in metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = ["AccuracyEvent", "EVENTS_FLAG", "Event", "RoundEvent", "ServerEvent", "StepEvent", "decode", "encode"]

EVENTS_FLAG = "--events-fd"
"""Tells a worker the file descriptor of the pipe to write its events to."""


@dataclass(frozen=True)
class StepEvent:
    """A worker's progress, every few steps.

    Args:
        worker: its name.
        unix_time_s: when.
        step: local steps done.
        loss: mean training loss since the last such event.
        samples_per_s: samples trained on per second since the last such event; time at the barrier counts.
        waited_s: seconds waited at the barrier since the start.
        global_step: rounds completed.
        moved_bytes: bytes of fragments that its process has sent and received; 0: it has no server.
    """

    kind: ClassVar[str] = "step"
    worker: str
    unix_time_s: float
    step: int
    loss: float
    samples_per_s: float
    waited_s: float
    global_step: int
    moved_bytes: int = 0


@dataclass(frozen=True)
class RoundEvent:
    """A round has committed. ``waited_s``: seconds that this worker's push waited for those of the others."""

    kind: ClassVar[str] = "round"
    worker: str
    unix_time_s: float
    step: int
    global_step: int
    waited_s: float


@dataclass(frozen=True)
class AccuracyEvent:
    """How good the center (chief) or the model of a lone worker is on the test images.

    Args:
        worker: its name.
        unix_time_s: when.
        step: local steps done.
        global_step: rounds completed.
        accuracy: the fraction (0 to 1) of the images that it classifies correctly.
        loss: mean cross-entropy, in nats.
    """

    kind: ClassVar[str] = "accuracy"
    worker: str
    unix_time_s: float
    step: int
    global_step: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class ServerEvent:
    """What a parameter server was doing. Bytes: of fragments, since it started.

    Args:
        server: which one: "ps-0", "ps-1", ...
        unix_time_s: when.
        phase: "uninitialized", "idle" (all workers compute), "averaging" or "stopping".
        global_step: rounds completed.
        received_bytes: from the workers.
        sent_bytes: to the workers.
        waiting_for: names of workers that the round waits for.
        waiting_for_omitted: how many more it waits for, whose names are left out.
        received_raw_bytes: what ``received_bytes`` would be without compression.
        sent_raw_bytes: what ``sent_bytes`` would be.
    """

    kind: ClassVar[str] = "server"
    server: str
    unix_time_s: float
    phase: str
    global_step: int
    received_bytes: int
    sent_bytes: int
    waiting_for: tuple[str, ...]
    waiting_for_omitted: int = 0
    received_raw_bytes: int = 0
    sent_raw_bytes: int = 0


Event = StepEvent | RoundEvent | AccuracyEvent | ServerEvent
_CLASSES: dict[str, type[Event]] = {cls.kind: cls for cls in (StepEvent, RoundEvent, AccuracyEvent, ServerEvent)}


def encode(event: Event) -> str:
    """One line of JSON, without the newline."""
    return json.dumps({"kind": event.kind, **asdict(event)})


def decode(line: str) -> Event:
    """The event that `encode` wrote. Raises ValueError for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        return _CLASSES[fields.pop("kind")](**fields)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"not an event: {line!r}") from None
