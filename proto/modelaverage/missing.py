"""For whom a round waits, in a form that has an end: a few names, and how many there are besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelaverage.names import MAX_NAMES, listed, quoted
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Missing"]


@dataclass(frozen=True)
class Missing:
    """The workers whose pushes are missing.

    Args:
        names: of those that are known; `MAX_NAMES` at most.
        omitted: how many names are left out.
        unknown: how many more the round needs that were not heard of yet.
    """

    names: tuple[str, ...] = ()
    omitted: int = 0
    unknown: int = 0

    @classmethod
    def of(cls, names: Sequence[str], omitted: int = 0, unknown: int = 0) -> Missing:
        """As the constructor, for any number of names: the first ones are kept."""
        return cls(tuple(names[:MAX_NAMES]), omitted + max(0, len(names) - MAX_NAMES), unknown)

    @classmethod
    def told(cls, message: pb.WaitingNotice | pb.GetStatusResponse) -> Missing:
        """What a server says. One that is older than this limit says all names."""
        return cls.of(message.waiting_for, message.waiting_for_omitted, message.waiting_for_unknown)

    def __bool__(self) -> bool:
        return bool(self.names or self.omitted or self.unknown)

    @property
    def count(self) -> int:
        """How many there are altogether."""
        return len(self.names) + self.omitted + self.unknown

    def notice(self, round_age_s: float) -> pb.WaitingNotice:
        """What a worker is told."""
        return pb.WaitingNotice(
            waiting_for=self.names,
            waiting_for_omitted=self.omitted,
            waiting_for_unknown=self.unknown,
            round_age_s=round_age_s,
        )

    def text(self, show: Callable[[str], str] = quoted) -> str:
        """``'a', 'b' and 11,984 more, 2 not heard of yet``; "nobody" if nobody is missing.

        Args:
            show: how each name is written.
        """
        known = listed(self.names, self.omitted, show)
        unknown = f"{self.unknown:,} not heard of yet" if self.unknown else ""
        return ", ".join(filter(None, (known, unknown))) or "nobody"
