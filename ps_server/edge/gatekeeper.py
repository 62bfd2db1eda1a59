"""Checks the token of every call before its handler runs; authorization.py has the rules."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from modelaverage.access.tokens import METADATA_KEY, token_of
from modelaverage.errors import FAULTS, ModelAverageError, refusal_metadata
from modelaverage.logs import event
from ps_server.flow.caller import caller_role
from ps_server.rules.authorization import Tokens, check

__all__ = ["Gatekeeper"]

_WARNING_INTERVAL_S = 1.0
_log = logging.getLogger("ps_server")
if TYPE_CHECKING:  # gRPC's classes have parameters in its stubs only
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class Gatekeeper(_Interceptor):
    """Refuses calls whose token does not allow them. Runs at the beginning of a call, not for each message.

    Args:
        tokens: returns the tokens that the server knows at the moment.
    """

    def __init__(self, tokens: Callable[[], Tokens]) -> None:
        self._tokens = tokens
        self._warned_at_s = -math.inf

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """The handler of the call, or one that refuses it."""
        sent = [
            token
            for key, value in handler_call_details.invocation_metadata
            if key == METADATA_KEY and (token := token_of(value)) is not None
        ]
        tokens = self._tokens()
        error = check(tokens, handler_call_details.method, sent)
        if error is None:
            caller_role.set(tokens.role_of(sent[0]) if sent else None)
            return await continuation(handler_call_details)
        # So that a stranger who tries a thousand tokens a second does not fill the disk with log lines.
        now_s = time.monotonic()
        is_news = now_s - self._warned_at_s >= _WARNING_INTERVAL_S
        if is_news:
            self._warned_at_s = now_s
        return _refusing(handler_call_details.method, error, logging.WARNING if is_news else logging.DEBUG)


def _refusing(method: str, error: ModelAverageError, level: int) -> _Handler:
    """A handler that refuses a call of any kind before reading from it."""
    assert error.reason is not None
    reason = error.reason

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        _log.log(
            level,
            "%r from %s refused: %s: %s",
            method,
            context.peer(),
            reason.name,
            error,
            extra=event(
                "call_refused", rpc=method.rpartition("/")[2], reason=reason.name, worker=None, peer=context.peer()
            ),
        )
        await context.abort(grpc.StatusCode[FAULTS[reason].status], str(error), refusal_metadata(reason))

    return grpc.stream_stream_rpc_method_handler(refuse)
