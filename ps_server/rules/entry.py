"""One worker's entry in the ledger of the round in progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from modelaverage.errors import Reason, refusal
from modelaverage.purpose import Purpose
from ps_server.rules.decisions import Push

__all__ = ["Entry", "EntryState"]


class EntryState(enum.Enum):
    """How much of a push has arrived."""

    EMPTY = enum.auto()
    """Nothing: the worker may still leave the round or send a different push."""
    PARTIAL = enum.auto()
    """Some fragments are in the sums and cannot be removed."""
    WHOLE = enum.auto()
    """Every fragment that the push owes."""


@dataclass
class Entry:
    """A worker in the round.

    Args:
        push: what it contributes.
        wanted: the next fragment to receive. Earlier ones are in the sums or not owed.
        whole_at_s: when the push became whole; None: it is not whole.
        stream: the attached stream; None: the last one has ended.
        attached: the push that this stream opened. After a restart of the worker it differs from `push`.
        attached_at_s: when the stream was attached.
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
        """How much of the push has arrived."""
        if self.whole_at_s is not None:
            return EntryState.WHOLE
        return EntryState.PARTIAL if self.wanted else EntryState.EMPTY

    @property
    def is_broken(self) -> bool:
        """Whether its stream ended in the middle of its push."""
        return self.stream is None and self.state is EntryState.PARTIAL

    @property
    def abstains(self) -> bool:
        """Whether the push sends no fragments."""
        return self.push.purpose is Purpose.ABSTAIN

    @property
    def restores(self) -> bool:
        """Whether the push restores the next center."""
        return self.push.purpose is Purpose.RESTORE

    def check_rival(self, push: Push) -> None:
        """Checks that another push of this worker may replace the attached one.

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
