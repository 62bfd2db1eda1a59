"""One wait for the checkpoint disk, with log lines if it takes long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from modelaverage.logs import event

__all__ = ["DiskWait"]

_log = logging.getLogger("ps_server")


class DiskWait:
    """One wait, from its creation to its `end`. Logs that it lasts after ``patience_s``, then after twice as long, and
    so on, and logs its end if it had logged before. Needs a running event loop.

    Args:
        what: what is being written, such as "checkpoint".
        global_step: the global_step of the center.
        directory: where it is written.
        patience_s: how long the wait may last before the first log line.
        meanwhile: what happens to rounds in the meantime, for the log.
        clock: seconds, monotonic.

    Attributes:
        since_s: when it began, on ``clock``.
    """

    def __init__(
        self,
        what: str,
        global_step: int,
        directory: Path,
        patience_s: float,
        meanwhile: str,
        clock: Callable[[], float],
    ) -> None:
        self.since_s = clock()
        self._what = f"the {what} of global_step {global_step}"
        self._global_step = global_step
        self._directory = directory
        self._patience_s = patience_s
        self._meanwhile = meanwhile
        self._clock = clock
        self._is_said = False
        self._timer = asyncio.get_running_loop().call_later(patience_s, self._say, patience_s)

    @property
    def problem(self) -> str:
        """What waits, where, and since when; empty during the first ``patience_s``."""
        return self._lasts if self._waited_s >= self._patience_s else ""

    def end(self, is_written: bool = False) -> None:
        """Ends the wait.

        Args:
            is_written: whether the write has reached the disk.
        """
        self._timer.cancel()
        if self._is_said and is_written:
            path, step, waited_s = str(self._directory), self._global_step, self._waited_s
            what = event("checkpoint_written_late", path=path, round=step, waited_s=waited_s)
            _log.warning("%s was written to %s after %.0f s", self._what, path, waited_s, extra=what)

    def give_up(self) -> None:
        """Ends the wait without result, because the server ends."""
        self._timer.cancel()
        path, step = str(self._directory), self._global_step
        what = event("checkpoint_given_up", path=path, round=step, waited_s=self._waited_s)
        _log.warning("the server ends, and %s; the next one may not find it", self._lasts, extra=what)

    def _say(self, gap_s: float) -> None:
        self._is_said = True
        path, step = str(self._directory), self._global_step
        what = event("checkpoint_hangs", path=path, round=step, waited_s=self._waited_s)
        _log.warning("%s; %s", self._lasts, self._meanwhile, extra=what)
        self._timer = asyncio.get_running_loop().call_later(2 * gap_s, self._say, 2 * gap_s)

    @property
    def _waited_s(self) -> float:
        return self._clock() - self.since_s

    @property
    def _lasts(self) -> str:
        return f"{self._what} has been waiting for {self._directory} for {self._waited_s:.0f} s"
