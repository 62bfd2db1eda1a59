"""Runs endless work while something else runs to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine

__all__ = ["beside"]


@contextlib.asynccontextmanager
async def beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs endless ``work`` until the body ends. An exception of ``work`` ends the body, and is raised."""
    body = asyncio.current_task()
    assert body is not None
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda ended: None if ended.cancelled() else body.cancel())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
