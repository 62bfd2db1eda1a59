"""The other servers of a job, which a page shows beside its own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from threading import Thread

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.status import NoAnswerError, Seen

__all__ = ["OtherShards"]

# An answer that is older is not shown: nobody has looked meanwhile, so nobody has asked. Finding out why a server does
# not answer takes less.
_OLD_FROM_S = 10.0
_WAIT_S = 0.3


class OtherShards:
    """Asks servers for their status, each on a thread of its own: one that does not answer holds up nobody.

    Args:
        addresses: of the servers.
        fetch: returns the status of the server at an address; raises NoAnswerError.
    """

    def __init__(self, addresses: Sequence[str], fetch: Callable[[str], pb.GetStatusResponse]) -> None:
        self._others = [_Other(address, fetch) for address in addresses]

    async def seen(self) -> tuple[Seen, ...]:
        """Asks, and returns what is known after a third of a second at the latest: the answers, or what was known
        before of those who give none."""
        answers = [asyncio.wrap_future(asked) for other in self._others if (asked := other.ask()) and not other.is_away]
        if answers:
            await asyncio.wait(answers, timeout=_WAIT_S)
        return tuple(other.seen() for other in self._others)


class _Other:
    """One of them."""

    def __init__(self, address: str, fetch: Callable[[str], pb.GetStatusResponse]) -> None:
        self._address, self._fetch = address, fetch
        self._status: pb.GetStatusResponse | None = None
        self._answered_at_s = self._heard_at_s = -math.inf
        self._problem = ""
        self._asked: futures.Future[None] | None = None  # done when it has answered, or will not

    @property
    def is_away(self) -> bool:
        """Whether it gave no answer when it was last asked."""
        return bool(self._problem)

    @property
    def _is_old(self) -> bool:
        """Whether nothing has been heard lately, neither an answer nor a problem."""
        return time.monotonic() - self._heard_at_s > _OLD_FROM_S

    def seen(self) -> Seen:
        """What is known."""
        if self._problem:
            return Seen(self._address, self._status, self._problem, time.monotonic() - self._answered_at_s)
        return Seen(self._address, None if self._is_old else self._status)

    def ask(self) -> futures.Future[None] | None:
        """Asks, unless it is being asked. Returns what is done then; None: it cannot be asked."""
        if self._asked is None or self._asked.done():
            if self._is_old and not self._problem:
                self._answered_at_s = time.monotonic()  # it may have answered until now, had it been asked
            asked: futures.Future[None] = futures.Future()
            asked.set_running_or_notify_cancel()  # nobody can cancel it from here on
            self._asked = asked
            try:
                Thread(target=self._ask, args=(asked,), name="shard", daemon=True).start()
            except RuntimeError as error:  # no thread is left
                self._asked, self._problem = None, f"{self._address} cannot be asked: {error}"
        return self._asked

    def _ask(self, asked: futures.Future[None]) -> None:
        try:
            self._status = self._fetch(self._address)
        except NoAnswerError as error:
            self._problem = str(error)
        else:
            self._answered_at_s, self._problem = time.monotonic(), ""
        finally:
            self._heard_at_s = time.monotonic()
            asked.set_result(None)
