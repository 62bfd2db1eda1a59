"""A channel whose credentials can be renewed: later calls use a connection with the new ones.

A gRPC channel itself never changes its credentials, not even when it reconnects.
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
    """A channel for any thread. Calls that are under way when the credentials change are not affected.

    Args:
        credentials: returns the current credentials; the same object until they change.
        connect: makes a channel with given credentials.
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
                # The earlier channel is not closed, which would end its calls; it is freed after the last of them.
                self._channel, self._credentials = self._connect(credentials), credentials
            return self._channel

    def unary_unary(self, *args: Any, **options: Any) -> _Call:  # type: ignore[override]
        """Like gRPC's; so are the other three."""
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
        """Like gRPC's, for the newest connection."""
        self._current().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Like gRPC's, for the newest connection."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """Closes the newest connection and ends its calls."""
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
    """Makes calls of one method."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._make()(*args, **options)

    def with_call(self, *args: Any, **options: Any) -> Any:
        """Like gRPC's."""
        return self._make().with_call(*args, **options)

    def future(self, *args: Any, **options: Any) -> Any:
        """Like gRPC's."""
        return self._make().future(*args, **options)
