"""What the server remembers of each worker, for the status: nothing here decides anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Roster", "WorkerRecord"]


# Names come from outside: whoever makes up new ones must not fill the memory.
_MAX_RECORDS = 10_000


@dataclass
class WorkerRecord:
    """One worker since the server started. Times are the server's monotonic clock, in seconds."""

    last_seen_at_s: float
    is_chief: bool = False
    has_pushed: bool = False
    local_step: int = 0
    nonfinite_values: int = 0
    pushes_counted: int = 0


@dataclass
class Roster:
    """Every worker that was heard of."""

    records: dict[str, WorkerRecord] = field(default_factory=dict)

    def heard_of(self, worker_id: str, now_s: float) -> WorkerRecord:
        """The record of a worker that has just been heard of. Of very many, those heard of last are kept."""
        record = self.records.pop(worker_id, None) or WorkerRecord(now_s)
        self.records[worker_id] = record  # the last heard of come last
        record.last_seen_at_s = now_s
        if len(self.records) > _MAX_RECORDS:
            del self.records[next(iter(self.records))]
        return record

    def waiting_for(self, complete: frozenset[str], num_workers: int) -> tuple[list[str], int]:
        """Whom a round waits for: the names of known workers that are not complete, and how many more it needs."""
        missing = num_workers - len(complete)
        others = {w: record for w, record in self.records.items() if w not in complete} if missing > 0 else {}
        names = [worker_id for worker_id, record in others.items() if record.has_pushed]
        if len(names) < missing:  # somebody may not have pushed yet; an evaluator only pulls, too
            names = list(others)
        return sorted(names), max(0, missing - len(names))

    def count(self, contributors: Iterable[str]) -> None:
        """A round committed with these workers' pushes."""
        for worker_id in contributors:
            if worker_id in self.records:
                self.records[worker_id].pushes_counted += 1

    def note_nonfinite(self, values: Mapping[str, int]) -> None:
        """So many values of these workers were not finite."""
        for worker_id, count in values.items():
            if worker_id in self.records:
                self.records[worker_id].nonfinite_values += count
