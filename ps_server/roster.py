"""What the server remembers of each worker, for the status: nothing here decides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelaverage.v1 import parameter_server_pb2 as pb

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
    lateness_s: float | None = None  # in the last round that counted it
    lateness_sum_s: float = 0.0  # over all of them
    loss: float | None = None
    peer: str = ""
    transport: pb.Transport = pb.TRANSPORT_UNSPECIFIED  # of its last push
    last_push: tuple[bytes, int] | None = None

    def note_push(self, header: pb.PushHeader, peer: str) -> None:
        """The header of a push came."""
        self.has_pushed, self.is_chief, self.local_step, self.peer = True, header.is_chief, header.local_step, peer
        self.loss = header.loss if header.HasField("loss") else None

    def is_retry(self, key: tuple[bytes, int]) -> bool:
        """Whether a push was heard of before; remembers it."""
        known, self.last_push = self.last_push == key, key
        return known


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

    def count(self, lateness_s: Mapping[str, float]) -> None:
        """A round committed with these workers' pushes, which were so late."""
        for worker_id, late_s in lateness_s.items():
            record = self.records.get(worker_id)
            if record is not None:
                record.pushes_counted += 1
                record.lateness_s = late_s
                record.lateness_sum_s += late_s

    def note_nonfinite(self, values: Mapping[str, int]) -> None:
        """So many values of these workers were not finite."""
        for worker_id, count in values.items():
            if worker_id in self.records:
                self.records[worker_id].nonfinite_values += count
