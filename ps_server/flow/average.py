"""The average of a round on its way down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from modelaverage import wire
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.buffers import Buffer

__all__ = ["Average"]

_MESSAGES_KEPT = 8


@dataclass
class Average:
    """The average in the making, or just made: fragments below ``finished`` of ``buffer`` may be sent."""

    buffer: Buffer
    finished: int = 0

    def __post_init__(self) -> None:
        buffer = self.buffer
        # Workers that keep pace are sent the same bytes, so they are made once.
        self.message = lru_cache(_MESSAGES_KEPT)(
            lambda first, end: wire.encode_fragment(first, (buffer.fragments(first, end),))
        )

    @property
    def segment(self) -> Segment | None:
        """The shared memory that it lies in, if it does."""
        return self.buffer.segment

    def data(self, first: int, end: int) -> memoryview:
        """The encoded bytes of consecutive fragments, up to but not with ``end``."""
        return self.buffer.fragments(first, end)
