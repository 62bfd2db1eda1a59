"""Work that takes long, done beside the event loop: everything else goes on meanwhile."""

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
    """One thread that does what it is given, one thing after the other. Started in advance: when work comes, a machine
    may have no thread to spare. Before `start` and after `stop`, work is done at once, on the event loop."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_there = False

    def start(self) -> None:
        """Raises RuntimeError if the machine has no thread for it."""
        Thread(target=self._serve, name="helper", daemon=True).start()
        self._is_there = True

    def stop(self) -> None:
        """The thread ends when its work is done; nobody has to wait for that."""
        if self._is_there:
            self._is_there = False
            self._work.put(None)

    async def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns or raises. If this is cancelled before it has begun, it is not begun."""
        if not self._is_there:
            return work()
        done: Future[_T] = Future()
        self._work.put((done, work))
        return await asyncio.wrap_future(done)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            _do(*item)
            del item  # what it returned may be as large as the model


@contextmanager
def no_collections() -> Iterator[None]:
    """For making a million objects that stay. Python would look through all of them for garbage again and again, while
    they are made and later, and every thread would wait for that, the event loop's too."""
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
