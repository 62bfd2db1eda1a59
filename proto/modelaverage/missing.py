"""The workers that a round waits for, in bounded form: a few names, and the number of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from modelaverage.names import MAX_NAMES, listed, quoted
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["LastSeen", "Missing"]


# A shorter silence is not mentioned.
_SILENT_FROM_S = 5.0
# How many names of finished workers a notice may have in addition to the other names.
_MAX_FINISHED = 4


@dataclass(frozen=True)
class LastSeen:
    """What is known of a worker whose push is missing.

    Args:
        has_left: whether its process has said goodbye without having finished.
        age_s: seconds since the server last heard from it; None: never.
    """

    has_left: bool = False
    age_s: float | None = None

    @property
    def text(self) -> str:
        """The remark that follows its name; empty if there is none."""
        if self.has_left:
            return "has left"
        return "" if self.age_s is None or self.age_s < _SILENT_FROM_S else f"last heard from {self.age_s:.0f} s ago"


@dataclass(frozen=True)
class Missing:
    """The workers whose pushes are missing.

    Args:
        names: names of missing workers; `MAX_NAMES` at most.
        omitted: how many more are known, whose names are left out.
        unknown: how many more the round needs whose names the server does not know.
        last_seen: what is known about each of ``names``, in their order; empty: nothing.
    """

    names: tuple[str, ...] = ()
    omitted: int = 0
    unknown: int = 0
    last_seen: tuple[LastSeen, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, names: Sequence[str], omitted: int = 0, unknown: int = 0) -> Missing:
        """Like the constructor, for any number of names: keeps the first ones."""
        return cls(tuple(names[:MAX_NAMES]), omitted + max(0, len(names) - MAX_NAMES), unknown)

    @classmethod
    def told(cls, message: pb.WaitingNotice | pb.GetStatusResponse) -> Missing:
        """Reads a server's message. A server from before the limit may send more names."""
        found = cls.of(message.waiting_for, message.waiting_for_omitted, message.waiting_for_unknown)
        if isinstance(message, pb.WaitingNotice):
            seen = [LastSeen(m.has_left, _age_s(m)) for m in message.missing[: len(found.names)]]
        else:
            known = {worker.worker_id: LastSeen(worker.has_left, worker.last_seen_age_s) for worker in message.workers}
            seen = [known.get(name, LastSeen()) for name in found.names]
        return replace(found, last_seen=tuple(seen))

    def __bool__(self) -> bool:
        return bool(self.names or self.omitted or self.unknown)

    @property
    def count(self) -> int:
        """How many workers are missing."""
        return len(self.names) + self.omitted + self.unknown

    @property
    def unknown_text(self) -> str:
        """How many workers the server has not heard from yet, in words; empty if there are none."""
        return f"{self.unknown:,} not heard from yet" if self.unknown else ""

    def notice(self, round_age_s: float, finished: Sequence[str] = (), training: int = 0) -> pb.WaitingNotice:
        """The notice for a waiting worker.

        Args:
            round_age_s: how old the round is.
            finished: workers that have finished.
            training: how many workers still train.
        """
        missing = [pb.MissingWorker(has_left=seen.has_left, last_seen_age_s=seen.age_s) for seen in self.last_seen]
        return pb.WaitingNotice(
            waiting_for=self.names,
            waiting_for_omitted=self.omitted,
            waiting_for_unknown=self.unknown,
            round_age_s=round_age_s,
            missing=missing,
            finished=finished[:_MAX_FINISHED],
            finished_omitted=max(0, len(finished) - _MAX_FINISHED),
            workers_training=training,
        )

    def text(self, show: Callable[[str], str] = quoted) -> str:
        """``'a', 'b' and 11,984 more, 2 not heard from yet``; "nobody" if nobody is missing.

        Args:
            show: how each name is written.
        """
        said = {name: seen.text for name, seen in zip(self.names, self.last_seen)}  # noqa: B905 (last_seen may be empty)
        known = listed(
            self.names, self.omitted, lambda name: show(name) + (f" ({said[name]})" if said.get(name) else "")
        )
        return ", ".join(filter(None, (known, self.unknown_text))) or "nobody"


def _age_s(missing: pb.MissingWorker) -> float | None:
    return missing.last_seen_age_s if missing.HasField("last_seen_age_s") else None
