"""A local worker that is restarted when it fails, up to a limit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from ps_worker.engines.processes import Child, LineHandler, ProcessFailedError, all_end_well, how_it_ended

__all__ = ["LocalWorker"]

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


class LocalWorker:
    """A worker's process, and the processes that replace it when it fails. Needs a running event loop.

    Args:
        name: for messages.
        start: starts a process; its argument says whether the process replaces a failed one. May raise OSError.
        max_restarts: how often it may be restarted.
        on_message: called at every restart.

    Attributes:
        restarts: how often it was restarted.
        exit_code: of its last process; negative: the signal that ended it; None: it has not ended for good.
        ended: done when it has ended with exit code 0 and all its lines were handled; fails with ProcessFailedError, or
            with the exception that a handler of lines raised.
    """

    def __init__(self, name: str, start: Callable[[bool], Child], max_restarts: int, on_message: LineHandler) -> None:
        self.name = name
        self.restarts = 0
        self.exit_code: int | None = None
        self._start = start
        self._max_restarts = max_restarts
        self._on_message = on_message
        self._child = self._started(False)
        self.ended = asyncio.ensure_future(self._keep())
        self.ended.add_done_callback(_take_exception)

    def _started(self, again: bool) -> Child:
        child = self._start(again)
        if self._max_restarts:
            # Kills the failed process's children, which would be in the way of its replacement.
            child.exit_code.add_done_callback(lambda code: _clear_away(child) if code.result() != 0 else None)
        return child

    async def _keep(self) -> None:
        while True:
            try:
                await all_end_well([self._child])
            except ProcessFailedError:
                how = how_it_ended(self._child.exit_code.result())
                if self.restarts == self._max_restarts:
                    self.exit_code = self._child.exit_code.result()
                    restarts = f" ({_times(self.restarts)})" if self.restarts else ""
                    raise self._child.tail.failure(f"{self.name} {how}{restarts}") from None
            else:
                self.exit_code = 0
                return
            pause_s = min(_FIRST_PAUSE_S * 2**self.restarts, _LONGEST_PAUSE_S)
            self.restarts += 1
            self._on_message(
                f"{self.name} {how} (restart {self.restarts} of {self._max_restarts}); it starts again in {pause_s:g} s"
            )
            await asyncio.sleep(pause_s)
            self._child = self._started(True)


def _clear_away(child: Child) -> None:
    child.kill(signal.SIGKILL)


def _times(restarts: int) -> str:
    return "1 restart" if restarts == 1 else f"{restarts} restarts"


def _take_exception(ended: asyncio.Task[None]) -> None:
    # The first failure ends the run; nobody asks for the results of the others.
    if not ended.cancelled():
        ended.exception()
