"""The average of a round on its way down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from modelaverage import wire
from modelaverage.codecs import Codec
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.buffers import Buffer

__all__ = ["Average", "Coded"]

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
            lambda codec, first, end: wire.encode_fragment(first, buffer.encoded(codec, first, end))
        )


@dataclass(frozen=True)
class Coded:
    """An average as a codec writes it."""

    average: Average
    codec: Codec

    @property
    def segment(self) -> Segment | None:
        """The shared memory that the average lies in, if it does."""
        return self.average.buffer.segment

    def data(self, first: int, end: int) -> Sequence[memoryview]:
        """Consecutive fragments, up to but not with ``end``; bytes to be joined."""
        return self.average.buffer.encoded(self.codec, first, end)

    def message(self, first: int, end: int) -> bytes:
        """The same as a message of the call."""
        return self.average.message(self.codec, first, end)
