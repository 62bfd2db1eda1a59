"""Pulls: clients read the center, or wait until the chief has initialized it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from modelaverage.logs import event
from modelaverage.names import MAX_NAMES, listed
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.buffers import Reader
from ps_server.flow.answer import send_buffer
from ps_server.flow.call import Call
from ps_server.flow.job import Job

__all__ = ["WaitForChief", "send_pulled"]

_log = logging.getLogger("ps_server")


async def send_pulled(job: Job, call: Call, request: pb.PullRequest) -> None:
    """Answers a pull: header, then every fragment that the request names, all of one step."""
    reader = Reader(job.clock(), call.fail)
    with job.reading(reader) as (buffer, step):
        header = job.pull_header.encode(step, job.round.policy.num_workers, buffer.center_id)
        count = 0 if request.header_only else job.manifest.fragment_count
        first = request.first_fragment if request.continued_step == step else 0
        await send_buffer(call, header, buffer, reader, range(first, count))


class WaitForChief:
    """Pulls that wait for a center, and the log lines about that wait. Used on one running event loop.

    Args:
        clock: seconds, monotonic.
        notice_s: how often a waiting pull is sent a notice (proxies end calls that are idle for a minute or less), and
            when the log first says that there is no center.

    Attributes:
        calls: the waiting pulls.
    """

    def __init__(self, clock: Callable[[], float], notice_s: float) -> None:
        self.calls: set[Call] = set()
        self._clock = clock
        self._notice_s = notice_s
        self._started_at_s = clock()
        self._is_over = asyncio.Event()

    def end(self) -> None:
        """There is a center."""
        self._is_over.set()

    async def wait(self, call: Call, accepts_notices: bool) -> None:
        """Returns once there is a center. A client that accepts notices receives them, so that proxies do not end the
        idle call."""
        self.calls.add(call)
        try:
            since_s = self._clock()
            while accepts_notices and not self._is_over.is_set():
                notice = pb.ChiefNotice(waited_s=self._clock() - since_s)
                await call.write(pb.PullResponse(waiting=notice).SerializeToString())
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._is_over.wait(), self._notice_s)
            await self._is_over.wait()
        finally:
            self.calls.discard(call)

    async def say_so(self, chiefs: Callable[[], list[str]]) -> None:
        """Returns once there is a center; until then the log says at growing gaps that there is none.

        Args:
            chiefs: names the workers that are sending a center.
        """
        gap_s = self._notice_s
        while not self._is_over.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), gap_s)
                return
            gap_s = 2 * gap_s
            waited_s = self._clock() - self._started_at_s
            names = sorted({call.worker_id for call in self.calls})
            waiting = f"; waiting with it: {listed(names)}" if names else ""
            sending = chiefs()
            if sending:
                chief = f"{listed(sending)} is sending it"
            else:
                chief = f"no chief (worker 0) has come to initialize it for {waited_s:.0f} s"
            _log.warning(
                "there is no center yet: %s%s",
                chief,
                waiting,
                extra=event("center_awaited", waited_s=waited_s, workers=names[:MAX_NAMES]),
            )
