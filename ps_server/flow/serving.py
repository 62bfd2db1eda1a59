"""Common to all calls: errors become gRPC statuses, and a stopping server ends its calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

import grpc.aio

from modelaverage.errors import FAULTS, ModelAverageError, Reason, refusal, refusal_metadata
from modelaverage.logs import event
from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S
from ps_server.flow.call import Call, Context
from ps_server.machine.connections import Taking, cut, taking
from ps_server.machine.trouble import describe, is_expected
from ps_server.seen.observations import Observations
from ps_server.seen.traffic import Traffic

__all__ = ["GOING_DOWN", "Serving", "while_taken"]

_log = logging.getLogger("ps_server")
# A status message travels in HTTP/2 headers, whose size is limited; there, a byte that is not ASCII takes three.
_MAX_MESSAGE_BYTES = 2000
# A refused client that takes longer than this to read the earlier data on its call loses its connection, unless bytes
# are still moving to it: then the link is slow.
_LAST_WORD_TIMEOUT_S = 2.0
GOING_DOWN = "the parameter server is going down; try again when it is back"
_T = TypeVar("_T")


class Serving:
    """The open calls of the server. Used on one running event loop.

    Args:
        traffic: where calls count the bytes of fragments.
        observations: where to count refused calls.
        stall_timeout_s: a call whose client stalls for longer fails.

    Attributes:
        calls: the open calls.
        is_stopping: whether calls are refused; GetStatus is not.
    """

    def __init__(self, traffic: Traffic, observations: Observations, stall_timeout_s: float) -> None:
        self.calls: set[Call] = set()
        self.is_stopping = False
        self._traffic = traffic
        self._observations = observations
        self._stall_timeout_s = stall_timeout_s

    async def serve(self, rpc: str, context: Context, body: Callable[[Call], Awaitable[_T]]) -> _T:
        """Runs one call. A `ModelAverageError` becomes its gRPC status, with the reason's name in the metadata."""
        call: Call | None = None
        try:
            call = Call(context, self._traffic, self._stall_timeout_s)
            return await self._run(rpc, call, body)
        except (ModelAverageError, asyncio.CancelledError) as raised:
            # Without a failure, gRPC cancelled the task: the client is gone.
            failure = raised if call is None or call.failure is None else call.failure
        except grpc.aio.BaseError:
            raise  # gRPC uses this to end a call
        except Exception as unexpected:
            failure = unexpected
        worker_id = "" if call is None else call.worker_id
        reason, message = _refusal(rpc, worker_id, str(context.peer()), failure)
        del failure  # its traceback holds this frame and what the call was sending
        self._observations.refused[reason.name] += 1
        _log.debug(
            "%s refused: %s: %s",
            rpc,
            reason.name,
            message,
            extra=event("call_refused", rpc=rpc, reason=reason.name, worker=worker_id, peer=str(context.peer())),
        )
        with suppress(asyncio.CancelledError):  # `fail` may have been called by this very task
            await asyncio.sleep(0)
        code = grpc.StatusCode[FAULTS[reason].status]
        last_word = asyncio.ensure_future(context.abort(code, _short(message), refusal_metadata(reason)))
        try:
            await while_taken(last_word, lambda: taking(str(context.peer())))
        except asyncio.TimeoutError:
            if cut(str(context.peer())):
                what = event("connection_cut", peer=str(context.peer()), reason=reason.name)
                _log.warning(
                    "%s reads nothing, not even the refusal %s: its connection is cut",
                    context.peer(),
                    reason.name,
                    extra=what,
                )
        raise asyncio.CancelledError  # only after a timeout: a delivered status makes abort raise

    async def _run(self, rpc: str, call: Call, body: Callable[[Call], Awaitable[_T]]) -> _T:
        self.calls.add(call)
        try:
            if self.is_stopping and rpc != "GetStatus":
                raise refusal(Reason.SERVER_STOPPING, GOING_DOWN)
            return await body(call)
        finally:
            self.calls.discard(call)
            call.end()


def _refusal(rpc: str, worker_id: str, peer: str, failure: BaseException) -> tuple[Reason, str]:
    """The reason and message for the client. Raises the failure itself if it is no error of the call."""
    if isinstance(failure, ModelAverageError) and failure.reason is not None:
        return failure.reason, str(failure)
    if not isinstance(failure, Exception):
        raise failure from None
    what = event("call_failed", rpc=rpc, worker=worker_id, peer=peer, cause=describe(failure))
    trace = None if is_expected(failure) else failure
    _log.error("%s failed: %s", rpc, describe(failure), extra=what, exc_info=trace)
    return Reason.SERVER_OVERLOADED, f"the server failed ({describe(failure)}); call again after a pause"


async def while_taken(
    last_word: asyncio.Future[NoReturn],
    look: Callable[[], Taking | None],
    timeout_s: float = _LAST_WORD_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
) -> None:
    """Waits for a call's status to be sent, as long as the data before it keeps moving.

    Args:
        last_word: done when the client's side has the status.
        look: returns what the client's connection has taken; None: there is no connection.
        timeout_s: how long a client that has taken all data may leave the call open.
        silence_timeout_s: how long the data on its way may stand still.

    Raises:
        asyncio.TimeoutError: the client takes nothing.
    """
    before, still_s = None, 0.0
    try:
        while not (await asyncio.wait((last_word,), timeout=timeout_s))[0]:
            now = look()
            still_s = 0.0 if now is not None and now.goes_on_since(before) else still_s + timeout_s
            if now is None or now.waiting_bytes == 0 or still_s >= silence_timeout_s:
                raise asyncio.TimeoutError
            before = now
        await last_word
    finally:
        last_word.cancel()


def _short(message: str) -> str:
    return message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
