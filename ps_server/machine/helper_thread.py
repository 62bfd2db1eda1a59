"""Does long work outside the event loop, so that everything else goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

__all__ = ["HelperThread", "no_collections"]

_T = TypeVar("_T")


class HelperThread:
    """One thread that runs one piece of work after another. It is started in advance, because the machine may have no
    thread to spare when work comes. Before `start` and after `stop`, work runs at once, on the event loop."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_there = False

    def start(self) -> None:
        """Starts the thread. Raises RuntimeError if the machine has none to spare."""
        Thread(target=self._serve, name="helper", daemon=True).start()
        self._is_there = True

    def stop(self) -> None:
        """Lets the thread end after its present work, without waiting for it."""
        if self._is_there:
            self._is_there = False
            self._work.put(None)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Runs ``work`` and returns or raises what it does. If this call is cancelled before ``work`` has begun,
        ``work`` is not run."""
        if not self._is_there:
            return work()
        done: Future[_T] = Future()
        self._work.put((done, work))
        return await asyncio.wrap_future(done)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            _do(*item)
            del item  # its result may be as large as the model


@contextmanager
def no_collections() -> Iterator[None]:
    """For creating a million long-lived objects. Otherwise Python would search all of them for garbage repeatedly,
    while they are created and later, and every thread would wait for that, including the event loop's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _do(done: Future[Any], work: Callable[[], Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
