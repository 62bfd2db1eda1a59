"""An event loop whose time stands still until the fuzzer moves it: no sockets, no sleeping, the same run every time."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["EndlessError", "VirtualLoop"]

_T = TypeVar("_T")
# Cancelled timers stay in the heap until so many of them have gathered.
_CANCELLED_TIMERS = 200
# No clock stands still while something runs.
_TICK_S = 1e-6


class EndlessError(Exception):
    """Something keeps itself busy: there is still something to do after more steps than any input needs."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as tasks, futures and timers need.

    Attributes:
        problems: what asyncio would have logged: exceptions in callbacks, and of tasks that nobody asked.
    """

    @classmethod
    def create(cls) -> VirtualLoop:
        """A new one. (To mypy the class is abstract: it has only what is needed.)"""
        return cls()

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self._now_s = 1000.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._cancelled = 0

    # What the fuzzer calls.

    def settle(self, max_steps: int) -> None:
        """Runs whatever can run at the present time. Raises EndlessError if that takes more steps."""
        asyncio._set_running_loop(self)
        try:
            for _ in range(max_steps):
                if not self._ready:
                    return
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        raise EndlessError(f"still busy after {max_steps} steps")

    def advance(self, seconds: float, max_steps: int) -> None:
        """Lets time pass; timers go off in their order, each at its own time."""
        end_s = self._now_s + seconds
        for _ in range(max_steps):
            if not self._timers or self._timers[0][0] > end_s:
                self._now_s = max(self._now_s, end_s)
                return
            when_s, _, timer = heapq.heappop(self._timers)
            if timer.cancelled():
                self._cancelled -= 1
                continue
            self._now_s = max(self._now_s, when_s) + _TICK_S
            self._ready.append(timer)
            self.settle(max_steps)
        raise EndlessError(f"still busy after {max_steps} timers in {seconds:g} s")

    # What asyncio calls.

    def time(self) -> float:
        """Seconds."""
        return self._now_s

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """Always."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def create_future(self) -> asyncio.Future[Any]:
        """As asyncio's."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, _T], **_: Any) -> asyncio.Task[_T]:  # type: ignore[override]
        """As asyncio's."""
        return asyncio.Task(coro, loop=self)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Notes the problem."""
        self.problems.append(context)

    def _timer_handle_cancelled(self, _: asyncio.TimerHandle) -> None:
        self._cancelled += 1
        if self._cancelled > _CANCELLED_TIMERS:
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0
