"""How long several calls may take together."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Deadline"]


class Deadline:
    """A time that is set once and left to run over several calls.

    Args:
        timeout_s: how long everything together may take; None: as long as it takes.
        clock: seconds, monotonic.
    """

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end_s = None if timeout_s is None else clock() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it."""
        return self._end_s is not None and self._clock() >= self._end_s

    @property
    def left_s(self) -> float | None:
        """What is left of it; never zero, so that gRPC reports DEADLINE_EXCEEDED itself."""
        return None if self._end_s is None else max(0.001, self._end_s - self._clock())
