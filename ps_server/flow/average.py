"""The average of a round while it is sent to the workers."""

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
    """An average, complete or not: the first ``finished`` fragments of ``buffer`` may be sent, raw and, if it
    ``is_coded``, in the job's codec."""

    buffer: Buffer
    finished: int = 0
    is_coded: bool = True

    def __post_init__(self) -> None:
        buffer = self.buffer
        # Workers at the same pace receive the same messages, so each is built once.
        self.message = lru_cache(_MESSAGES_KEPT)(
            lambda codec, first, end: wire.encode_fragment(first, buffer.encoded(codec, first, end))
        )


@dataclass(frozen=True)
class Coded:
    """An average encoded by a codec."""

    average: Average
    codec: Codec

    @property
    def segment(self) -> Segment | None:
        """The shared memory that holds the average; None: it is in private memory."""
        return self.average.buffer.segment

    def data(self, first: int, end: int) -> Sequence[memoryview]:
        """Fragments ``first`` to ``end`` - 1, as pieces of bytes to be joined."""
        return self.average.buffer.encoded(self.codec, first, end)

    def message(self, first: int, end: int) -> bytes:
        """The same fragments as one message of the call."""
        return self.average.message(self.codec, first, end)
