"""What has happened in a run so far, in order, by kind and worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ps_worker.events.parse import AccuracyEvent, Event, RoundEvent, ServerEvent, StepEvent, decode

__all__ = ["Record", "Score"]


@dataclass(frozen=True)
class Score:
    """How good a model is on the test images: the fraction (0 to 1) that it classifies correctly, and its mean
    cross-entropy in nats."""

    accuracy: float
    loss: float

    def __str__(self) -> str:
        return f"{self.accuracy:.4f}, loss {self.loss:.4f}"


class Record:
    """The events of one run.

    Attributes:
        steps, rounds, accuracies: of each worker, by its name.
        servers: of each parameter server, by its name.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.steps: defaultdict[str, list[StepEvent]] = defaultdict(list)
        self.rounds: defaultdict[str, list[RoundEvent]] = defaultdict(list)
        self.accuracies: defaultdict[str, list[AccuracyEvent]] = defaultdict(list)
        self.servers: defaultdict[str, list[ServerEvent]] = defaultdict(list)
        for event in events:
            self.add(event)

    @classmethod
    def read(cls, metrics_file: Path) -> Record:
        """Reads lines that `events.encode` wrote. Raises OSError, and ValueError for any other line."""
        return cls(decode(line) for line in metrics_file.read_text(encoding="utf-8").splitlines())

    def add(self, event: Event) -> None:
        """Adds an event."""
        match event:
            case StepEvent():
                self.steps[event.worker].append(event)
            case RoundEvent():
                self.rounds[event.worker].append(event)
            case AccuracyEvent():
                self.accuracies[event.worker].append(event)
            case ServerEvent():
                self.servers[event.server].append(event)

    def last_step(self, worker: str) -> StepEvent | None:
        """The latest progress of a worker; None before the first."""
        return self.steps[worker][-1] if self.steps[worker] else None

    def last_of_servers(self) -> list[ServerEvent]:
        """The latest event of each parameter server that has one."""
        return [events[-1] for events in self.servers.values()]

    def last_score(self, worker: str) -> Score | None:
        """The latest score of a worker on the test images; None before the first."""
        if not self.accuracies[worker]:
            return None
        last = self.accuracies[worker][-1]
        return Score(last.accuracy, last.loss)

    def last_accuracy(self, worker: str) -> float | None:
        """The latest test accuracy (0 to 1) that a worker found; None before the first."""
        return self.accuracies[worker][-1].accuracy if self.accuracies[worker] else None
