"""An event loop whose time stands still until the fuzzer moves it: no sockets but those of sockets.py, no sleeping, the
same run every time."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fuzz.sockets import Listener, MemorySocket

__all__ = ["EndlessError", "VirtualLoop"]

_T = TypeVar("_T")
# Cancelled timers stay in the heap until there are this many of them.
_CANCELLED_TIMERS = 200
# A real clock does not stand still while timers run: each adds this much.
_TICK_S = 1e-6


class EndlessError(Exception):
    """The loop never comes to rest: there is still something to do after more steps than any input needs."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as tasks, futures and timers need.

    Attributes:
        problems: what asyncio would have logged: exceptions in callbacks, and of tasks whose result nothing retrieved.
    """

    @classmethod
    def create(cls) -> VirtualLoop:
        """A new loop. (To mypy the class is abstract, since it has only the methods that are needed.)"""
        return cls()

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self._now_s = 1000.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._readers: dict[MemorySocket | Listener, asyncio.Handle] = {}
        self._writers: dict[MemorySocket, asyncio.Handle] = {}

    # What the fuzzer calls.

    def settle(self, max_steps: int) -> None:
        """Runs whatever can run at the present time. Raises EndlessError if that takes more steps."""
        asyncio._set_running_loop(self)
        try:
            for _ in range(max_steps):
                if not self._ready:
                    self._poll()
                if not self._ready:
                    return
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        raise EndlessError(f"still busy after {max_steps} steps")

    def advance(self, seconds: float, max_steps: int) -> None:
        """Lets time pass; timers go off in order, each at its own time."""
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

    @property
    def watched(self) -> list[MemorySocket | Listener]:
        """Sockets with a registered reader or writer."""
        return [*self._readers, *self._writers]

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

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """As asyncio's, for sockets of sockets.py."""
        self._watch(self._readers, fd, callback, args)

    def remove_reader(self, fd: Any) -> bool:
        """As asyncio's."""
        return self._watch_no_longer(self._readers, fd)

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """As asyncio's, for sockets of sockets.py."""
        self._watch(self._writers, fd, callback, args)

    def remove_writer(self, fd: Any) -> bool:
        """As asyncio's."""
        return self._watch_no_longer(self._writers, fd)

    async def sock_accept(self, sock: Any) -> tuple[Any, Any]:
        """As asyncio's."""
        accepted: tuple[Any, Any] = await self._when_possible(self._readers, sock, sock.accept)
        return accepted

    async def _when_possible(self, watched: dict[Any, asyncio.Handle], sock: Any, attempt: Callable[[], Any]) -> Any:
        while True:
            try:
                return attempt()
            except BlockingIOError:
                pass
            possible = self.create_future()
            self._watch(watched, sock, _set_once, (possible,))
            try:
                await possible
            finally:
                self._watch_no_longer(watched, sock)

    def _watch(
        self, watched: dict[Any, asyncio.Handle], sock: Any, callback: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        if sock.is_closed:
            raise ValueError("a socket that is closed cannot be watched")
        self._watch_no_longer(watched, sock)
        watched[sock] = asyncio.Handle(callback, args, self, None)

    def _watch_no_longer(self, watched: dict[Any, asyncio.Handle], sock: Any) -> bool:
        handle = watched.pop(sock, None)
        if handle is not None:
            handle.cancel()
        return handle is not None

    def _poll(self) -> None:
        """Wakes the readers and writers of sockets that are ready."""
        if not self._readers and not self._writers:
            return
        for sock in self.watched:
            if sock.is_closed:  # otherwise the next socket with its number would be taken for it
                self.problems.append({"message": "a socket was closed while it was watched"})
                self.remove_reader(sock)
                self._watch_no_longer(self._writers, sock)
        self._ready += [handle for sock, handle in self._readers.items() if sock.readable]
        self._ready += [handle for sock, handle in self._writers.items() if sock.writable]

    def _timer_handle_cancelled(self, _: asyncio.TimerHandle) -> None:
        self._cancelled += 1
        if self._cancelled > _CANCELLED_TIMERS:
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
