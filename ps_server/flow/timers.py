"""Timers of a round: when it must act, and when it logs which workers it waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from modelaverage.logs import event
from modelaverage.missing import Missing

__all__ = ["RoundTimers", "log_wait"]

_log = logging.getLogger("ps_server")


class RoundTimers:
    """Two timers on the running event loop.

    Args:
        clock: seconds, monotonic.
        expire: called when the round is due.
        notice: called when a worker has waited for ``first_notice_s``, then after twice as long, and so on.
        first_notice_s: see ``notice``.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        expire: Callable[[], None],
        notice: Callable[[], None],
        first_notice_s: float,
    ) -> None:
        self._clock = clock
        self._expire = expire
        self._notice = notice
        self._first_notice_s = first_notice_s
        self._due: asyncio.TimerHandle | None = None
        self._next_notice: asyncio.TimerHandle | None = None

    def set(self, due_at_s: float | None, somebody_waits: bool) -> None:
        """Sets the timers to the current state of the round.

        Args:
            due_at_s: when the round must act, on the clock; None: only an event changes it.
            somebody_waits: whether a worker with a whole push waits for others.
        """
        if self._due is not None:
            self._due.cancel()
        self._due = None
        if due_at_s is not None:
            delay_s = max(0.0, due_at_s - self._clock())
            self._due = asyncio.get_running_loop().call_later(delay_s, self._expire)
        if somebody_waits and self._next_notice is None:
            self._plan_notice(self._first_notice_s)
        elif not somebody_waits and self._next_notice is not None:
            self._next_notice.cancel()
            self._next_notice = None

    def _plan_notice(self, gap_s: float) -> None:
        self._next_notice = asyncio.get_running_loop().call_later(gap_s, self._give_notice, gap_s)

    def _give_notice(self, gap_s: float) -> None:
        try:
            self._notice()
        finally:
            self._plan_notice(2 * gap_s)


def log_wait(step: int, age_s: float, missing: Missing, is_prepared: bool) -> None:
    """Logs that the round of this step has waited ``age_s`` seconds, and for which workers or its checkpoint."""
    _log.warning(
        "round %d has waited %.0f s for %s",
        step,
        age_s,
        "its checkpoint" if is_prepared else missing.text(),
        extra=event(
            "round_waits",
            round=step,
            waited_s=age_s,
            waiting_for=missing.names,
            waiting_for_omitted=missing.omitted,
            waiting_for_unknown=missing.unknown,
        ),
    )
