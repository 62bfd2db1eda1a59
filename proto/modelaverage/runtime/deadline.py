"""How long several calls may take together."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Deadline"]


class Deadline:
    """A time limit for several calls together, which starts when it is made.

    Args:
        timeout_s: how long the calls may take in all; None: no limit.
    """

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end_s = None if timeout_s is None else clock() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether the time has passed."""
        return self._end_s is not None and self._clock() >= self._end_s

    @property
    def left_s(self) -> float | None:
        """The time that is left; None: no limit. Never zero, so that gRPC itself reports DEADLINE_EXCEEDED."""
        return None if self._end_s is None else max(0.001, self._end_s - self._clock())
