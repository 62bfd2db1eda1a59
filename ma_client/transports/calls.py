"""What the client needs of a carrier of its calls to a server. gRPC is one carrier, this process's memory another.

Messages are bytes here; faults are the exceptions of `modelaverage.errors`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from modelaverage.runtime.deadline import Deadline

__all__ = ["Calls", "Exchange", "Requests"]

Requests = bytes | Iterator[bytes]
"""What goes up: one message, or a stream, which is read on a thread of its own."""


class Exchange(Protocol):
    """A call that is under way, as an iterator over the server's messages."""

    def __iter__(self) -> Iterator[bytes]: ...

    def __next__(self) -> bytes: ...

    def cancel(self) -> object:
        """Ends the call. From any thread."""


class Calls(Protocol):
    """The calls of one server. One at a time, by one thread; `stop` from any.

    Every message that comes, and every fault but the server's absence, is a sign of life.

    Attributes:
        address: of the server.
        stopped: set while whatever is under way has to end.
        is_encrypted: whether nobody on the way can read what goes.
        answered_at_s: when the server was last heard of, on the monotonic clock.
    """

    address: str
    stopped: threading.Event
    is_encrypted: bool
    answered_at_s: float

    def connect(self, timeout_s: float) -> None:
        """Waits for the server to be there.

        Raises:
            ServerUnavailableError: nobody answers in that time.
            SecurityError: somebody does, but server and client do not trust each other.
        """

    def ask(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> bytes:
        """The answer of a call that has one.

        Args:
            rpc: its name.
            requests: what goes up.
            deadline: when it has to be over.
            late: what did not happen if it is not over by then, for the message.

        Raises:
            ModelAverageError: the server's refusal; DeadlineExceededError; ServerUnavailableError: it is not there.
        """

    def exchange(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> AbstractContextManager[Exchange]:
        """A call whose answer is a stream. It ends with the context, in which faults are raised as `ask` does."""

    def heard(self) -> None:
        """There is a sign of life that is no message: the server has taken what went up."""

    def stop(self) -> None:
        """Ends the call that is under way, and those that are begun until `stopped` is cleared. From any thread."""

    def close(self) -> None:
        """Ends whatever is under way, for good."""
