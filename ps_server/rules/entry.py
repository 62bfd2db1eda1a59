"""One worker's entry in the ledger of the round in progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from modelaverage.errors import Reason, refusal
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Push

__all__ = ["Entry", "EntryState"]


class EntryState(enum.Enum):
    """How much of a push has come."""

    EMPTY = enum.auto()
    """Nothing: the worker may still leave the round, or make another push."""
    PARTIAL = enum.auto()
    """Some fragments are in the sums, and cannot be taken out."""
    WHOLE = enum.auto()
    """All that it owes."""


@dataclass
class Entry:
    """A worker that takes part in the round.

    Args:
        push: what it contributes.
        wanted: its next fragment. Those before it are in the sums, or are not owed.
        whole_at_s: when the push became whole; None: it is not.
        stream: the stream that is attached; None: its last one has ended.
        attached: the push that this stream came with. After a restart of the worker that is another one than `push`.
        attached_at_s: when it came.
        detached_at_s: when the last stream ended.
    """

    push: Push
    wanted: int = 0
    whole_at_s: float | None = None
    stream: int | None = None
    attached: Push | None = None
    attached_at_s: float = 0.0
    detached_at_s: float = 0.0

    @property
    def state(self) -> EntryState:
        """How much of the push has come."""
        if self.whole_at_s is not None:
            return EntryState.WHOLE
        return EntryState.PARTIAL if self.wanted else EntryState.EMPTY

    @property
    def is_broken(self) -> bool:
        """Whether its stream ended in the middle of its push."""
        return self.stream is None and self.state is EntryState.PARTIAL

    @property
    def abstains(self) -> bool:
        """Whether it gives no fragments."""
        return self.push.purpose is Purpose.ABSTAIN

    @property
    def restores(self) -> bool:
        """Whether it gives the next center back."""
        return self.push.purpose is Purpose.RESTORE

    def check_rival(self, push: Push) -> None:
        """Whether another push of this worker may take the place of what is attached.

        Raises:
            ConflictError: WORKER_ID_IN_USE or PUSH_SUPERSEDED.
        """
        if self.attached is not None and self.attached.incarnation != push.incarnation:
            raise refusal(
                Reason.WORKER_ID_IN_USE,
                f"worker id {push.worker_id!r} is in use by another live process; give every worker its own",
            )
        for other in (self.attached, self.push):
            if other is not None and other.incarnation == push.incarnation and other.push_id > push.push_id:
                raise refusal(
                    Reason.PUSH_SUPERSEDED,
                    f"push {push.push_id} of {push.worker_id!r} comes late: push {other.push_id} is in the round",
                )
