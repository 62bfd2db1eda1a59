"""Takes samples of the server while somebody looks, and makes documents of them. On the page's thread and loop.

A sample is taken on the server's loop, at most once an interval however many browsers look, and none if nobody does.
Its documents are made here, once for all browsers that have seen the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

from ps_server.console.status import Seen
from ps_server.page.documents import Since, next_since, rounds_csv, rounds_json, status_json
from ps_server.page.log_tail import LogTail
from ps_server.page.shards import OtherShards
from ps_server.seen.sample import PageSample

__all__ = ["Feed", "NoSampleError", "PageView", "SampleSource"]

_SAMPLE_TIMEOUT_S = 5.0
# Documents of rounds in one view: for those who have just come, and for those who have seen an earlier view.
_MAX_DOCUMENTS = 8
_PART_BYTES = 1 << 16


class NoSampleError(Exception):
    """The server's loop has no time for a sample, or has ended."""


@dataclass(frozen=True)
class SampleSource:
    """Where samples come from.

    Args:
        sample: takes one; to be called on ``loop``.
        loop: the server's.
        address: where workers reach the server.
        epoch_at: the Unix time at which the server's clock was 0.
        log: the last events.
        others: what is known of the job's other servers.
    """

    sample: Callable[[], PageSample]
    loop: asyncio.AbstractEventLoop
    address: str
    epoch_at: float
    log: LogTail
    others: OtherShards

    async def take(self) -> PageSample:
        """A sample. Raises NoSampleError."""
        found: futures.Future[PageSample] = futures.Future()

        def on_the_loop() -> None:
            if not found.set_running_or_notify_cancel():  # the browser has gone
                return
            try:
                found.set_result(self.sample())
            except BaseException as error:
                found.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(on_the_loop)
            return await asyncio.wait_for(asyncio.wrap_future(found), _SAMPLE_TIMEOUT_S)
        except (RuntimeError, asyncio.TimeoutError):  # the loop is closed, or busy
            raise NoSampleError("the server does not answer") from None


@dataclass
class PageView:
    """One sample and its documents.

    Args:
        number: counts views from 1.
        sample: of the server.
        source: where it came from.
        others: what is known of the job's other servers.
    """

    number: int
    sample: PageSample
    source: SampleSource
    others: tuple[Seen, ...]
    _status: bytes = field(default=b"", init=False)
    _rounds: dict[Since, list[bytes]] = field(default_factory=dict, init=False)

    @property
    def status(self) -> bytes:
        """The state of the server, as JSON."""
        if not self._status:
            source = self.source
            events = source.log.events()
            self._status = status_json(self.sample, source.address, source.epoch_at, events, self.others)
        return self._status

    def rounds(self, since: Since) -> list[bytes]:
        """The rounds that a reader lacks, as JSON in parts."""
        found = self._rounds.get(since)
        if found is None:
            step = self.sample.status.global_step
            found = list(_joined(rounds_json(self.sample.history, step, self.source.epoch_at, since)))
            if len(self._rounds) < _MAX_DOCUMENTS:
                self._rounds[since] = found
        return found

    @property
    def csv(self) -> bytes:
        """All rounds, as a table."""
        return rounds_csv(self.sample.history, self.source.epoch_at)

    @property
    def next_since(self) -> Since:
        """What a reader has who has read this view."""
        return next_since(self.sample.history)


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of one size or a little more, so that few writes are needed."""
    waiting = bytearray()
    for part in parts:
        waiting += part
        if len(waiting) >= _PART_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


class Feed:
    """The newest view.

    Args:
        source: where samples come from.
        interval_s: the least time between two samples.
    """

    def __init__(self, source: SampleSource, interval_s: float) -> None:
        self._source = source
        self._interval_s = interval_s
        self._turn = asyncio.Lock()
        self._view: PageView | None = None
        self._taken_at_s = -math.inf

    async def now(self) -> PageView:
        """A view that is at most one interval old. Raises NoSampleError."""
        async with self._turn:
            if self._view is None or self._wait_s > 0:
                return self._view if self._view is not None else await self._take()
            return await self._take()

    async def after(self, number: int) -> PageView:
        """A view newer than view ``number``. Raises NoSampleError."""
        async with self._turn:  # the first who waits takes a sample for all
            if self._view is None or self._view.number <= number:
                await asyncio.sleep(self._wait_s)
                await self._take()
            assert self._view is not None
            return self._view

    @property
    def _wait_s(self) -> float:
        """Until the next sample may be taken."""
        return max(0.0, self._taken_at_s + self._interval_s - asyncio.get_running_loop().time())

    async def _take(self) -> PageView:
        others = await self._source.others.seen()
        sample = await self._source.take()
        number = 1 if self._view is None else self._view.number + 1
        self._view = PageView(number, sample, self._source, others)
        self._taken_at_s = asyncio.get_running_loop().time()
        return self._view
