"""The average of a round while it is sent to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from modelaverage import wire
from modelaverage.codecs import Codec
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.buffers import Buffer

__all__ = ["Average", "Coded"]

_MESSAGES_KEPT = 8  # per average


@dataclass
class Average:
    """An average, complete or not: the first ``finished`` fragments of ``buffer`` may be sent, raw and, if it
    ``is_coded``, in the job's codec."""

    buffer: Buffer
    finished: int = 0
    is_coded: bool = True
    _messages: dict[tuple[Codec, int, int], bytes] = field(default_factory=dict, init=False)

    def message(self, codec: Codec, first: int, end: int) -> bytes:
        """Fragments ``first`` to ``end`` - 1 as one message of the call. Workers at the same pace receive the same
        messages, so each is built once."""
        message = self._messages.get((codec, first, end))
        if message is None:
            message = wire.encode_fragment(first, self.buffer.encoded(codec, first, end))
            self._messages[codec, first, end] = message
            if len(self._messages) > _MESSAGES_KEPT:
                del self._messages[next(iter(self._messages))]
        return message


class Coded(NamedTuple):
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
