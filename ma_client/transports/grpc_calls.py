"""Calls over gRPC: channels, attempts to connect, and gRPC's errors as exceptions of `modelaverage.errors`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from ma_client.process.forking import check_not_forked
from ma_client.process.threads import is_about_threads, keep_for_ever, without_thread
from ma_client.transports.calls import Exchange, Requests
from ma_client.transports.reach import Reach
from ma_client.transports.timing import TIMING, Timing
from modelaverage.access import proxies
from modelaverage.access.absence import no_answer
from modelaverage.access.channels import Access
from modelaverage.errors import (
    DeadlineExceededError,
    ModelAverageError,
    SecurityError,
    ServerUnavailableError,
    fault_told,
)
from modelaverage.rpcs import SERVICE
from modelaverage.runtime.deadline import Deadline
from modelaverage.runtime.tuning import CHANNEL_OPTIONS, SILENCE_TIMEOUT_S, connecting_for, keep_freed_memory

__all__ = ["GrpcCalls"]

# The first wait for a silent server before checking for a certificate problem; later waits double.
_FIRST_LOOK_S = 0.5
# The pause before asking a stopping server again.
_PAUSE_S = 0.1
_READY = grpc.ChannelConnectivity.READY.value[0]


def _as_is(message: bytes) -> bytes:
    return message


class GrpcCalls:
    """The calls of one server over a channel.

    Args:
        address: HOST:PORT or unix:PATH.
        access: how to connect to servers.
        timing: timeouts.

    Raises:
        ModelAverageError: this process was forked from one that has used gRPC.
    """

    def __init__(self, address: str, access: Access, timing: Timing = TIMING) -> None:
        self.address = address
        self.stopped = threading.Event()
        self.encryption = access.encryption(address)
        self.answered_at_s = time.monotonic()
        self._access = access
        self._timing = timing
        self._reach = Reach(address, timing)
        self._under_way: grpc.Call | None = None
        keep_freed_memory()
        self._open_channel()

    def _open_channel(self) -> None:
        check_not_forked()
        self._channel_lacks_thread = self._channel_is_lost = False
        options = [*_options(self._timing), connecting_for(self._reach.attempt_s)]
        self._channel = channel = self._access.channel(self.address, options)

        def at(rpc: str, kind: Callable[..., Any]) -> Any:
            return kind(f"/{SERVICE}/{rpc}", _as_is, _as_is)

        self._calls = {
            "Initialize": at("Initialize", channel.stream_unary),
            "Pull": at("Pull", channel.unary_stream),
            "PushAndAverage": at("PushAndAverage", channel.stream_stream),
            "Join": at("Join", channel.unary_stream),
            "Leave": at("Leave", channel.unary_unary),
            "GetStatus": at("GetStatus", channel.unary_unary),
        }
        # A single message needs no thread that sends, which would take a third of the processor time of a small push.
        self._calls_of_one_message = {**self._calls, "PushAndAverage": at("PushAndAverage", channel.unary_stream)}

    def connect(self, timeout_s: float) -> None:
        """See `Calls`."""
        deadline, look_s = Deadline(timeout_s), _FIRST_LOOK_S
        while True:
            try:
                look = Deadline(min(look_s, deadline.left_s or 0.0))
                self._ask("GetStatus", b"", look, "no status came", wait_for_ready=True)
                return
            except DeadlineExceededError:
                self._not_reached(look_s)
                distrust = self._access.problem(self.address)
                if distrust is not None:
                    raise SecurityError(distrust) from None
            except ServerUnavailableError as error:
                # This server is stopping, and another may start. Another kind of server will not change.
                if error.status == grpc.StatusCode.UNIMPLEMENTED.name or self.stopped.wait(_PAUSE_S):
                    raise
            if deadline.is_over:
                raise ServerUnavailableError(no_answer(self.address, timeout_s, "is `ps-server serve` running there?"))
            look_s *= 2

    def ask(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> bytes:
        """See `Calls`."""
        return self._ask(rpc, requests, deadline, late)

    def _ask(self, rpc: str, requests: Requests, deadline: Deadline, late: str, **options: Any) -> bytes:
        with self._faults(deadline, late):
            call = self._calls[rpc].future(requests, timeout=deadline.left_s, metadata=self._access.metadata, **options)
            try:
                self._begin(call)
                answer: bytes = call.result()
            finally:
                self._end(call)
            self.heard()
        return answer

    @contextmanager
    def exchange(self, rpc: str, requests: Requests, deadline: Deadline, late: str) -> Iterator[Exchange]:
        """See `Calls`."""
        with self._faults(deadline, late):
            calls = self._calls_of_one_message if isinstance(requests, bytes) else self._calls
            call = calls[rpc](requests, timeout=deadline.left_s, metadata=self._access.metadata)
            try:
                self._begin(call)
                yield _Heard(call, self.heard)
            finally:
                self._end(call)

    def heard(self) -> None:
        """See `Calls`."""
        self.answered_at_s = time.monotonic()
        self._reach.answered()

    def stop(self) -> None:
        """See `Calls`."""
        self.stopped.set()
        self._cancel_what_is_under_way()

    def close(self) -> None:
        """See `Calls`."""
        if not self._channel_lacks_thread:
            self._channel.close()

    @property
    def is_connected(self) -> bool:
        """Whether the channel is connected."""
        # gRPC has no suitable public method: `subscribe` starts a thread that may keep the process alive (1.85).
        state = getattr(getattr(self._channel, "_channel", None), "check_connectivity_state", lambda _: _READY)
        try:
            return bool(state(False) == _READY)
        except ValueError:  # the channel is closed
            return True

    def go_another_way(self) -> None:
        """Replaces a channel that does not connect although the server accepts connections. From any thread."""
        self._channel_is_lost = True
        self._cancel_what_is_under_way()

    def _cancel_what_is_under_way(self) -> None:
        call = self._under_way
        if call is not None:
            call.cancel()  # type: ignore[no-untyped-call]

    def _not_reached(self, lasted_s: float) -> None:
        if self._reach.failed(lasted_s):
            self._channel_is_lost = True  # a new channel makes longer attempts

    def _begin(self, call: grpc.Call) -> None:
        """From here to `_end`, `stop` ends the call."""
        self._under_way = call
        if self.stopped.is_set():
            call.cancel()  # type: ignore[no-untyped-call]

    def _end(self, call: grpc.Call) -> None:
        self._under_way = None
        call.cancel()  # type: ignore[no-untyped-call]

    @contextmanager
    def _faults(self, deadline: Deadline, late: str) -> Iterator[None]:
        """Turns gRPC's errors into exceptions of `modelaverage.errors`; ``late`` says what did not happen in time."""
        began_s = time.monotonic()
        try:
            if self._channel_lacks_thread or self._channel_is_lost:
                self._replace_channel()
            with self._reach.looking(self.go_another_way, lambda: self.is_connected):
                yield
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and self.answered_at_s < began_s:
                self._not_reached(time.monotonic() - began_s)
            fault = self._fault(error, deadline, late)
            fault.status = error.code().name
            raise fault from None
        except grpc.FutureCancelledError:
            if self._channel_is_lost and not self.stopped.is_set():
                raise self._is_elsewhere() from None
            raise ModelAverageError(f"the call to {self.address} was cancelled here") from None
        except RuntimeError as error:
            if not is_about_threads(error):
                raise
            self._abandon_channel()
            raise without_thread(f"no call to {self.address} can be made", error) from None
        except MemoryError:
            self._abandon_channel()  # the missing thread may be the channel's
            raise
        except ValueError as error:
            if "closed" not in str(error):  # gRPC's message for a closed channel
                raise
            raise ModelAverageError(f"the session with {self.address} is closed ({error})") from None

    def _abandon_channel(self) -> None:
        """gRPC had no thread for the channel: any call on it hangs, even its close."""
        self._channel_lacks_thread = True
        keep_for_ever(self._channel)  # its destructor would close it

    def _replace_channel(self) -> None:
        """Raises RuntimeError: no threads are left for a new channel."""
        if not self._channel_lacks_thread:
            self._channel.close()
        probe = threading.Thread(target=lambda: None)  # this one should fail, not the new channel's
        probe.start()
        probe.join()
        self._open_channel()

    def _is_elsewhere(self) -> ServerUnavailableError:
        return ServerUnavailableError(f"the parameter server at {self.address} is back, perhaps at another address")

    def _fault(self, error: grpc.RpcError, deadline: Deadline, late: str) -> ModelAverageError:
        details = error.details() or ""
        fault = fault_told(error.trailing_metadata(), details, error.code().name)
        if error.code() is not grpc.StatusCode.UNAVAILABLE and not isinstance(fault, ServerUnavailableError):
            self.answered_at_s = time.monotonic()
        if fault is not None:
            return fault
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED if deadline.timeout_s is not None:
                return DeadlineExceededError(f"{late}: waited {deadline.timeout_s:g} s for {self.address}")
            case grpc.StatusCode.UNAVAILABLE:
                return ServerUnavailableError(
                    f"the parameter server at {self.address} is gone ({details}); local variables are untouched"
                    f"{proxies.in_the_way(self.address)}"
                )
            case grpc.StatusCode.INTERNAL if "RST_STREAM" in details:  # a killed server ends its streams so
                return ServerUnavailableError(f"the parameter server at {self.address} broke off ({details})")
            case grpc.StatusCode.CANCELLED if self._channel_is_lost and not self.stopped.is_set():
                return self._is_elsewhere()
            case grpc.StatusCode.CANCELLED if not self.stopped.is_set():  # a stopping server had not begun to serve it
                return ServerUnavailableError(f"the parameter server at {self.address} broke off ({details})")
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServerUnavailableError(f"what answers at {self.address} is not a parameter server: {details}")
            case code:
                return ModelAverageError(f"{self.address} answered {code.name}: {details}")


class _Heard:
    """A call that reports each message as a sign of life."""

    def __init__(self, call: Any, heard: Callable[[], None]) -> None:
        self._call = call
        self._heard = heard

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        message: bytes = next(self._call)
        self._heard()
        return message

    def cancel(self) -> object:
        return self._call.cancel()


def _options(timing: Timing) -> list[tuple[str, int]]:
    """gRPC's channel options; with the keepalive of ``timing`` if it differs from the default."""
    options = dict(CHANNEL_OPTIONS)
    if timing.peer_silence_s != SILENCE_TIMEOUT_S:
        silence_ms = round(timing.peer_silence_s * 1000)
        options |= {"grpc.keepalive_timeout_ms": silence_ms, "grpc.http2.ping_timeout_ms": silence_ms}
    return list(options.items())
