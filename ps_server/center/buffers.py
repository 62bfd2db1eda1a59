"""The memory of a center: a flat buffer, how it differs from the center before, the outer optimizer's state for it, and
its readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest
from modelaverage.outer import AVERAGE, OuterOptimizer
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.state import OuterState

__all__ = ["Buffer", "Reader"]


@dataclass(eq=False)
class Reader:
    """One reader of a buffer.

    Args:
        since_s: when it could start reading.
        end: ends the reader with an error, after which it reads nothing more. None: it cannot be ended.
        read_bytes: how much it has read.
    """

    since_s: float
    end: Callable[[ModelAverageError], None] | None = None
    read_bytes: int = 0

    def pace(self, now_s: float) -> float:
        """Its speed in bytes per second."""
        return self.read_bytes / max(now_s - self.since_s, 1e-3)


class Buffer:
    """One flat buffer, initially all zero.

    Args:
        manifest: the layout of the buffer.
        segment: the shared memory that holds it; None: private memory of this process.
        outer: the outer optimizer, whose state lies in private memory.
        codec: the codec of the job, in which the change from the center before is kept.

    Attributes:
        center_id: names these bits; 0 with the codec `raw`.
        changes: every fragment in the job's codec, relative to the center before; None: it is not known so. Empty with
            the codec `raw`.
        readers: its current readers.
        flat: the whole buffer; uint8, `buffer_size_bytes`.
        arrays: the variables in it, by name; views.
        parts: for every fragment, the part of each variable that lies in it; views, one-dimensional.
        state: the outer optimizer's state for this center.
    """

    def __init__(
        self, manifest: Manifest, segment: Segment | None, outer: OuterOptimizer = AVERAGE, codec: Codec = RAW
    ) -> None:
        self._manifest = manifest
        self.readers = set[Reader]()
        self.segment = segment
        self.flat: NDArray[np.uint8] = (
            np.zeros(manifest.buffer_size_bytes, np.uint8) if segment is None else segment.body
        )
        self.arrays = manifest.arrays(self.flat)
        variables = [array.reshape(-1) for array in self.arrays.values()]
        self.parts: list[list[NDArray[np.generic]]] = [
            [variables[piece.variable][piece.start : piece.start + piece.count] for piece in pieces]
            for pieces in manifest.pieces
        ]
        self.state = OuterState(manifest, outer)
        self.center_id = 0
        self.changes: list[memoryview | None] = [] if codec is RAW else [None] * manifest.fragment_count

    def encoded(self, codec: Codec, first: int, end: int) -> Sequence[memoryview]:
        """Fragments ``first`` to ``end`` - 1 in the codec: `raw` or the job's. Pieces of bytes to be joined."""
        if codec is RAW:
            return [RAW.encode_run(self._manifest, self.flat, first, end)]
        changes = self.changes[first:end]
        assert None not in changes
        return [change for change in changes if change is not None]

    @property
    def in_use(self) -> bool:
        """Whether it has readers."""
        return bool(self.readers)

    def pace(self, now_s: float) -> float:
        """The speed of its fastest reader in bytes per second; infinite if a reader cannot be ended."""
        return max(math.inf if reader.end is None else reader.pace(now_s) for reader in self.readers)

    def retire(self) -> None:
        """The buffer is no longer the center, and a round may overwrite it."""
        if self.segment is not None:
            self.segment.retire()
