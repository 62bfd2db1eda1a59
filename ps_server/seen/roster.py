"""What the server remembers of each worker, for the status. No rule depends on it."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Rank", "Roster", "WorkerRecord"]


# Clients choose names: a client that invents names must not fill the memory.
_MAX_RECORDS = 10_000


class Rank(enum.IntEnum):
    """How certain it is that a client is a worker. Of too many, the higher ranks are remembered, named and shown."""

    READER = 0
    """It has only pulled."""
    PUSHER = 1
    """It has pushed, or is the chief."""
    COUNTED = 2
    """A round counted its push."""


@dataclass
class WorkerRecord:
    """One worker since the server started. Times are the server's monotonic clock, in seconds."""

    last_seen_at_s: float
    is_chief: bool = False
    may_push: bool = False  # whether a call of it had a token for more than reading, or none
    has_pushed: bool = False
    local_step: int = 0
    nonfinite_values: int = 0
    was_nonfinite: bool = False  # whether its last counted push had non-finite values
    interval_steps: int = 0  # local steps between two rounds; 0: not reported
    has_finished: bool = False
    has_left: bool = False  # its process left without having finished
    pushes_counted: int = 0
    lateness_s: float | None = None  # in the last round that counted it
    lateness_sum_s: float = 0.0  # the sum over all rounds
    loss: float | None = None
    peer: str = ""
    transport: pb.Transport = pb.TRANSPORT_UNSPECIFIED  # the transport of its last push
    last_push: tuple[bytes, int] | None = None
    queued_as: Rank = Rank.READER  # the roster's queue that it is in

    @property
    def rank(self) -> Rank:
        """How certain it is that this is a worker."""
        if self.pushes_counted:
            return Rank.COUNTED
        return Rank.PUSHER if self.has_pushed or self.is_chief else Rank.READER

    def note_push(self, header: pb.PushHeader, peer: str) -> None:
        """Records the header of a push."""
        self.has_pushed, self.is_chief, self.local_step, self.peer = True, header.is_chief, header.local_step, peer
        self.loss = header.loss if header.HasField("loss") else None

    def is_another_process(self, incarnation: bytes) -> bool:
        """Whether an earlier process of the worker made its last push."""
        return self.last_push is not None and self.last_push[0] != incarnation

    def is_retry(self, key: tuple[bytes, int]) -> bool:
        """Whether this push was seen before; remembers it."""
        known, self.last_push = self.last_push == key, key
        return known


@dataclass
class Roster:
    """The known workers. Of too many, those of the highest rank stay, and of these the most recently heard.

    Attributes:
        records: by worker id, ordered by last contact.
    """

    records: dict[str, WorkerRecord] = field(default_factory=dict)
    _nonfinite: Counter[str] = field(default_factory=Counter, init=False)
    # By rank, in the order of forgetting. A record whose rank has grown is moved only when its turn comes: no full
    # scan.
    _queues: tuple[dict[str, None], ...] = field(default_factory=lambda: tuple({} for _ in Rank), init=False)

    def heard_of(self, worker_id: str, now_s: float) -> WorkerRecord:
        """The record of a worker that has just made a call."""
        return self._heard_of(worker_id, now_s, pushes=False)

    def heard_push_of(self, worker_id: str, now_s: float) -> WorkerRecord:
        """Like `heard_of`, for a worker that pushes."""
        return self._heard_of(worker_id, now_s, pushes=True)

    def _heard_of(self, worker_id: str, now_s: float, pushes: bool) -> WorkerRecord:
        record = self.records.pop(worker_id, None)
        if record is None:
            record = WorkerRecord(now_s)
        else:
            del self._queues[record.queued_as][worker_id]
        record.last_seen_at_s = now_s
        record.has_left = False
        record.has_pushed = record.has_pushed or pushes
        self.records[worker_id] = record
        self._queue(worker_id, record)
        if len(self.records) > _MAX_RECORDS:
            self._forget_one()
        return record

    def _queue(self, worker_id: str, record: WorkerRecord) -> None:
        record.queued_as = record.rank
        self._queues[record.queued_as][worker_id] = None

    def _forget_one(self) -> None:
        for rank in Rank:
            queue = self._queues[rank]
            while queue:
                worker_id = next(iter(queue))
                del queue[worker_id]
                record = self.records[worker_id]
                if record.rank == rank:
                    del self.records[worker_id]
                    return
                self._queue(worker_id, record)

    def foremost(self, count: int) -> list[tuple[str, WorkerRecord]]:
        """Up to ``count`` records, sorted by name: those of the highest rank, and of these the most recently heard
        of."""
        found = list(reversed(self.records.items()))
        if len(found) > count:
            found = sorted(found, key=lambda item: -item[1].rank)[:count]
        return sorted(found, key=lambda item: item[0])

    def count(self, lateness_s: Mapping[str, float]) -> None:
        """A round committed with these workers' pushes; records how late each was."""
        for worker_id, late_s in lateness_s.items():
            record = self.records.get(worker_id)
            if record is not None:
                record.pushes_counted += 1
                record.lateness_s = late_s
                record.lateness_sum_s += late_s

    def note_nonfinite(self, values: Mapping[str, int]) -> None:
        """Records how many values of these workers were not finite."""
        for worker_id, count in values.items():
            if count and worker_id in self.records:
                self.records[worker_id].nonfinite_values += count
                self._nonfinite[worker_id] += count

    def take_nonfinite(self) -> Mapping[str, int]:
        """The counts from `note_nonfinite` since the last call."""
        taken, self._nonfinite = self._nonfinite, Counter()
        return taken
