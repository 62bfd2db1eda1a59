"""A channel whose credentials may be renewed: a call that is begun afterwards goes over a connection with the new ones.

A gRPC channel keeps its credentials for ever, also when it connects again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

__all__ = ["RenewedChannel"]

_Callable = Callable[..., Any]


class RenewedChannel(grpc.Channel):
    """A channel for any thread. Calls that are under way when the credentials change go on as they are.

    Args:
        credentials: the credentials as they are now; the same object until they change.
        connect: makes a channel with some.
    """

    def __init__(
        self,
        credentials: Callable[[], grpc.ChannelCredentials],
        connect: Callable[[grpc.ChannelCredentials], grpc.Channel],
    ) -> None:
        self._current_credentials, self._connect = credentials, connect
        self._lock = threading.Lock()
        self._credentials = credentials()
        self._channel = connect(self._credentials)
        self._is_closed = False

    def _current(self) -> grpc.Channel:
        with self._lock:
            credentials = self._current_credentials()
            if credentials is not self._credentials and not self._is_closed:
                # The one before is not closed, which would end calls under way; it goes with the last of them.
                self._channel, self._credentials = self._connect(credentials), credentials
            return self._channel

    def unary_unary(self, *args: Any, **options: Any) -> _Call:  # type: ignore[override]
        """As gRPC's own; likewise the other three."""
        return _Call(lambda: self._current().unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> _Call:  # type: ignore[override]
        """See `unary_unary`."""
        return _Call(lambda: self._current().unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> _Call:  # type: ignore[override]
        """See `unary_unary`."""
        return _Call(lambda: self._current().stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> _Call:  # type: ignore[override]
        """See `unary_unary`."""
        return _Call(lambda: self._current().stream_stream(*args, **options))

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False) -> None:
        """Of the connection as it is now."""
        self._current().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Of the connection as it is now."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """Ends the calls over the newest connection."""
        with self._lock:
            self._is_closed = True
        self._channel.close()

    def __enter__(self) -> RenewedChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Call:
    """What makes calls of one kind."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._make()(*args, **options)

    def with_call(self, *args: Any, **options: Any) -> Any:
        """As gRPC's own."""
        return self._make().with_call(*args, **options)

    def future(self, *args: Any, **options: Any) -> Any:
        """As gRPC's own."""
        return self._make().future(*args, **options)
