"""Calls to a server in this process: messages are passed in memory, without gRPC and sockets.

Such a server is registered in `SERVERS` under the address that sessions use. `ServerSide.begin` notifies it of every
call; it reads messages and answers from any thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from ma_client.transports.calls import Exchange, Requests
from modelaverage.access.contexts import Encryption
from modelaverage.errors import DeadlineExceededError, ModelAverageError, ServerUnavailableError, fault_named
from modelaverage.runtime.deadline import Deadline

__all__ = ["HALF_CLOSED", "MemoryCall", "MemoryCalls", "SCHEME", "SERVERS", "ServerSide"]

SCHEME = "_in_memory"
"""The host in the address of such a server; not a valid host name."""
HALF_CLOSED = object()
"""What `MemoryCall.take` returns after the client's last message."""
_PAUSE_S = 0.01


class ServerSide(Protocol):
    """Serves calls."""

    def begin(self, call: MemoryCall) -> None:
        """A call has begun. Returns at once."""


SERVERS: dict[str, ServerSide] = {}
"""The servers of this process, by address."""


class MemoryCall:
    """One call, with a side for the client and one for the server.

    Args:
        rpc: its name.
        peer: the caller, for the server.

    Attributes:
        on_change: called when a message has arrived or the client has cancelled the call; set by the server.
        is_cancelled: whether the client has cancelled the call.
    """

    def __init__(self, rpc: str, peer: str) -> None:
        self.rpc, self.peer = rpc, peer
        self.on_change: Callable[[], None] = lambda: None
        self.is_cancelled = False
        self._up = deque[object]()
        self._down = queue.SimpleQueue[bytes | _End]()

    # The server's side.

    def take(self) -> object:
        """The client's next message; HALF_CLOSED after the last one; None: none has arrived yet."""
        with suppress(IndexError):
            return self._up.popleft()
        return None

    def answer(self, message: bytes) -> None:
        """Sends one message to the client."""
        self._down.put(message)

    def end(self, reason: str | None = None, status: str = "OK", details: str = "") -> None:
        """Ends the call.

        Args:
            reason: the name of the protocol's reason, if the call is refused.
            status: the name of the corresponding gRPC status.
            details: the message for people.
        """
        self._down.put(_End(reason or "", status, details))

    # The client's side.

    def send(self, message: object) -> None:
        """Sends one message, or HALF_CLOSED, to the server."""
        self._up.append(message)
        self.on_change()

    def cancel(self) -> None:
        """Ends the call."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._down.put(_End("", "CANCELLED", "it was cancelled here"))
            self.on_change()

    def receive(self, timeout_s: float | None) -> bytes | _End:
        """The server's next message, or the call's end. Raises queue.Empty: neither arrived in this time."""
        return self._down.get(timeout=timeout_s)


class _End:
    """How a call ended, as reported by the server."""

    def __init__(self, reason: str, status: str, details: str) -> None:
        self.reason, self.status, self.details = reason, status, details


class MemoryCalls:
    """The calls of a server in this process.

    Args:
        address: the address under which it is registered.
    """

    encryption: Encryption | None = None

    def __init__(self, address: str) -> None:
        self.address = address
        self.stopped = threading.Event()
        self.answered_at_s = time.monotonic()
        self._under_way: MemoryCall | None = None
        self._is_closed = False

    def connect(self, timeout_s: float) -> None:
        """See `Calls`."""
        deadline = Deadline(timeout_s)
        while self.address not in SERVERS:
            if deadline.is_over or self.stopped.wait(_PAUSE_S):
                raise ServerUnavailableError(f"no parameter server answers at {self.address} (waited {timeout_s:g} s)")
        self.heard()

    def ask(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> bytes:
        """See `Calls`."""
        with self.exchange(rpc, requests, deadline, late) as answers:
            (answer,) = answers
        return answer

    @contextmanager
    def exchange(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> Iterator[Exchange]:
        """See `Calls`."""
        if self._is_closed:
            raise ModelAverageError(f"the session with {self.address} is closed")
        server = SERVERS.get(self.address)
        if server is None:
            raise self._gone("nothing listens there")
        call = MemoryCall(rpc, f"memory:{id(self):x}")
        self._under_way = call
        try:
            if isinstance(requests, bytes):
                call.send(requests)
                call.send(HALF_CLOSED)
            else:
                threading.Thread(target=_send_all, args=(call, requests), name="memory-call", daemon=True).start()
            server.begin(call)
            if self.stopped.is_set():
                call.cancel()
            yield _Answers(call, self, deadline, late)
        finally:
            self._under_way = None
            call.cancel()

    def heard(self) -> None:
        """See `Calls`."""
        self.answered_at_s = time.monotonic()

    def stop(self) -> None:
        """See `Calls`."""
        self.stopped.set()
        self._cancel_what_is_under_way()

    def close(self) -> None:
        """See `Calls`."""
        self._is_closed = True
        self._cancel_what_is_under_way()

    def fault(self, reason: str, status: str, details: str) -> ModelAverageError:
        """The exception for the end of a call."""
        fault = fault_named(reason, details)
        if fault is None and status == "CANCELLED":
            fault = ModelAverageError(f"the call to {self.address} was cancelled here")
        if fault is None:
            fault = self._gone(details)
        if status != "UNAVAILABLE":
            self.heard()
        fault.status = status
        return fault

    def _gone(self, details: str) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"the parameter server at {self.address} is gone ({details}); local variables are untouched",
            status="UNAVAILABLE",
        )

    def _cancel_what_is_under_way(self) -> None:
        call = self._under_way
        if call is not None:
            call.cancel()


class _Answers:
    """The server's messages in a call."""

    def __init__(self, call: MemoryCall, calls: MemoryCalls, deadline: Deadline, late: str) -> None:
        self._call, self._calls, self._deadline, self._late = call, calls, deadline, late

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            came = self._call.receive(self._deadline.left_s)
        except queue.Empty:
            self._call.cancel()
            raise DeadlineExceededError(
                f"{self._late}: waited {self._deadline.timeout_s:g} s for {self._calls.address}",
                status="DEADLINE_EXCEEDED",
            ) from None
        if isinstance(came, bytes):
            self._calls.heard()
            return came
        if came.status == "OK":
            raise StopIteration
        raise self._calls.fault(came.reason, came.status, came.details)

    def cancel(self) -> object:
        self._call.cancel()
        return None


def _send_all(call: MemoryCall, requests: Iterator[bytes]) -> None:
    for message in requests:
        if call.is_cancelled:
            return
        call.send(message)
    call.send(HALF_CLOSED)
