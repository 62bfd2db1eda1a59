"""The interface of a carrier of calls to a server. One carries them over gRPC, another within this process.

Messages are bytes; errors are the exceptions of `modelaverage.errors`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from modelaverage.access.contexts import Encryption
from modelaverage.runtime.deadline import Deadline

__all__ = ["Calls", "Exchange", "Requests"]

Requests = bytes | Iterator[bytes]
"""The request: one message, or a stream that a separate thread reads."""


class Exchange(Protocol):
    """A call in progress, as an iterator over the server's messages."""

    def __iter__(self) -> Iterator[bytes]: ...

    def __next__(self) -> bytes: ...

    def cancel(self) -> object:
        """Ends the call. From any thread."""


class Calls(Protocol):
    """The calls of one server. One call at a time, from one thread; `stop` from any thread.

    Every message received, and every error except the server's absence, counts as a sign of life.

    Attributes:
        address: the address of the server.
        stopped: set while any call must end.
        encryption: encrypts connections beside the calls as the calls are; None: the calls are in plain text.
        answered_at_s: when the server last showed a sign of life, on the monotonic clock.
    """

    address: str
    stopped: threading.Event
    encryption: Encryption | None
    answered_at_s: float

    def connect(self, timeout_s: float) -> None:
        """Waits until the server answers.

        Raises:
            ServerUnavailableError: no server answers in that time.
            SecurityError: a server answers, but server and client do not trust each other.
        """

    def ask(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> bytes:
        """Makes a call with a single answer, and returns it.

        Args:
            rpc: its name.
            requests: the request, or a stream of requests.
            deadline: when the call must be over.
            late: what did not happen by then, for the error message.

        Raises:
            ModelAverageError: the server's refusal; DeadlineExceededError; ServerUnavailableError: no server answers.
        """

    def exchange(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> AbstractContextManager[Exchange]:
        """Makes a call whose answer is a stream. It ends with the context, which raises the same errors as `ask`."""

    def heard(self) -> None:
        """Records a sign of life other than a message: the server has read data."""

    def stop(self) -> None:
        """Ends the current call, and calls begun before `stopped` is cleared. From any thread."""

    def close(self) -> None:
        """Ends the current call and closes the carrier."""
