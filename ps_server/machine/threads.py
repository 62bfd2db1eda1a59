"""Thread pools whose threads all run from the start, so that later work cannot fail because a thread is missing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["started_pool"]


def started_pool(size: int, name: str) -> ThreadPoolExecutor:
    """A pool of ``size`` threads that are running.

    An ordinary pool starts threads when work comes. If it cannot, it raises an error but keeps the work, and a later
    thread runs it unexpectedly.

    Raises:
        RuntimeError: the system has no more threads.
        MemoryError: there is no memory for them.
    """
    pool = ThreadPoolExecutor(size, name)
    gate = threading.Event()
    try:
        for _ in range(size):
            pool.submit(gate.wait)
    except BaseException:
        gate.set()
        pool.shutdown(wait=False)
        raise
    gate.set()
    return pool
