"""Retry policy: how long a session retries while the server is away, and how long it pauses between tries."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from modelaverage.errors import DeadlineExceededError, ModelAverageError, Reason, ServerUnavailableError
from modelaverage.logs import event
from modelaverage.runtime.deadline import Deadline
from modelaverage.runtime.tuning import GONE_AFTER_S

__all__ = ["Patience"]

_log = logging.getLogger("ma_client")
_T = TypeVar("_T")
_FIRST_SLEEP_S = 0.05
_LONGEST_SLEEP_S = 1.0
_FIRST_NOTICE_S = 5.0
# A process whose host has failed holds its worker id until the server's keepalive notices.
_ID_IN_USE_TIMEOUT_S = GONE_AFTER_S + 5.0


class Patience:
    """Retries calls that a server which is away, restarting or slow may answer later.

    Args:
        timeout_s: how long the server may be away in one stretch.
        answered_at_s: when it last showed a sign of life, on the clock of `time.monotonic`.
        stopped: ends a pause between two tries; the next try is expected to fail at once.
        peer: the server's address, for the log.
        progressed_at_s: when bytes of a model last moved, on that clock; a failure after that begins a new stretch.
        clock: seconds, monotonic.
        pause: waits for this time between two tries; None: waits on ``stopped``.
    """

    def __init__(
        self,
        timeout_s: float,
        answered_at_s: Callable[[], float],
        stopped: threading.Event | None = None,
        peer: str = "",
        progressed_at_s: Callable[[], float] = lambda: -math.inf,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._peer = peer
        self._timeout_s = timeout_s
        self._answered_at_s = answered_at_s
        self._progressed_at_s = progressed_at_s
        self._clock = clock
        self._pause = pause or (time.sleep if stopped is None else stopped.wait)

    def call(self, function: Callable[[], _T], deadline: Deadline) -> _T:
        """Calls ``function`` until it succeeds, or until the deadline, and returns its result.

        Raises:
            ServerUnavailableError: the server stayed away for too long.
            DeadlineExceededError: it stayed away until the deadline.
            ModelAverageError: the error of ``function``, if retries do not help.
        """
        away_since_s: float | None = None
        notice_s = _FIRST_NOTICE_S
        sleep_s, was_in_use = _FIRST_SLEEP_S, False
        while True:
            began_at_s = self._clock()
            try:
                return function()
            except ModelAverageError as error:
                timeout_s = self._worth_trying_for_s(error)
                if timeout_s is None:
                    raise
                now_s = self._clock()
                answered = self._answered_at_s() > began_at_s and isinstance(error, ServerUnavailableError)
                answered = answered or self._progressed_at_s() > began_at_s
                in_use = error.reason is Reason.WORKER_ID_IN_USE
                if away_since_s is None or answered or in_use != was_in_use:
                    away_since_s, sleep_s, was_in_use = now_s, _FIRST_SLEEP_S, in_use
                    notice_s = _FIRST_NOTICE_S
                    what = event("server_away", peer=self._peer, cause=str(error), patience_s=timeout_s)
                    _log.warning("%s; trying again for up to %g s", error, timeout_s, extra=what)
                tried_s = now_s - away_since_s
                if notice_s <= tried_s < timeout_s:
                    more_s, notice_s = timeout_s - tried_s, 2 * notice_s + _FIRST_NOTICE_S
                    what = event("server_away", peer=self._peer, cause=str(error), patience_s=more_s)
                    _log.warning("%s; tried for %.0f s, trying for up to %.0f more", error, tried_s, more_s, extra=what)
                if tried_s >= timeout_s:
                    message = f"{error} (tried again for {timeout_s:g} s)"
                    raise type(error)(message, error.reason, error.status) from None
                if deadline.is_over:
                    raise DeadlineExceededError(f"{error} (waited {deadline.timeout_s:g} s)", error.reason) from None
                # Half of the pause is random, so that workers that lost the server together do not return together.
                pause_s, left_s = sleep_s * random.uniform(0.5, 1.0), deadline.left_s
                if in_use and left_s is not None and left_s <= pause_s:
                    raise  # another try would only hit the deadline and hide the cause
                self._pause(pause_s if left_s is None else min(pause_s, left_s))
                sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)

    def _worth_trying_for_s(self, error: ModelAverageError) -> float | None:
        if isinstance(error, ServerUnavailableError) or error.reason is Reason.STREAM_STALLED:
            return self._timeout_s if self._timeout_s > 0 else None
        if error.reason is Reason.WORKER_ID_IN_USE:
            return min(_ID_IN_USE_TIMEOUT_S, self._timeout_s) if self._timeout_s > 0 else None
        return None
