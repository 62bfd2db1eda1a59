"""One call: reads and writes messages, and can be ended from outside. I/O only; no rules of the round.

A call may have to end while it is blocked in a read or a write, because its client stalls or because of an event
elsewhere. `fail` then cancels the task that serves the call and leaves the reason in `failure`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from modelaverage import wire
from modelaverage.errors import Reason, refusal
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.traffic import Traffic
from ps_server.transports.base import Aside, Content

__all__ = ["Call", "Context", "FIRST_WRITE_TIMEOUT_S"]

Context = grpc.aio.ServicerContext[bytes, bytes]

_T = TypeVar("_T")
_Openings = pb.InitializeRequest | pb.PushAndAverageRequest
_Opening = TypeVar("_Opening", pb.InitializeRequest, pb.PushAndAverageRequest)
_numbers = itertools.count(1)
# A client that takes longer than this to read a call's first message does not receive the call's status.
FIRST_WRITE_TIMEOUT_S = 1.0


class Call:
    """A call of one client, created in the task that serves it.

    Args:
        context: gRPC's side of it; messages are bytes.
        traffic: where to count the bytes of fragments.
        stall_timeout_s: the call fails with STREAM_STALLED when the client keeps it waiting for longer.
    """

    def __init__(self, context: Context, traffic: Traffic, stall_timeout_s: float) -> None:
        self.number = next(_numbers)
        self.expecting = False
        """True while the client owes messages."""
        self.worker_id = ""
        """The caller's worker id once it is known; for the log."""
        self._context = context
        self._traffic = traffic
        self._stall_timeout_s = stall_timeout_s
        self._message_type: type[_Openings] = pb.PushAndAverageRequest
        self._beside_header: Content | None = None
        self.failure: BaseException | None = None
        """Why the call's task was cancelled, if `fail` did it."""
        self._is_ending = False
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._read_at_s = self._loop.time()
        self._write_began_at_s: float | None = None
        self._aside: Aside | None = None
        self._aside_began_at_s: float | None = None
        self._has_written = False
        self._watchdog = self._loop.call_later(stall_timeout_s, self._watch)
        self.ended: asyncio.Future[None] = self._loop.create_future()

    @property
    def peer(self) -> str:
        """The client's address, as gRPC writes it, such as ``ipv4:10.0.0.7:51234``."""
        return str(self._context.peer())

    def fail(self, error: BaseException) -> None:
        """Ends the call with ``error``, even while it is blocked. The first failure counts."""
        if self._is_ending or self._task is None:
            return
        if self.failure is None:
            self.failure = error
        if self._has_written or self._write_began_at_s is None:
            self._cancel()
        else:
            # While a call's first message is being written, gRPC would drop the status. Cancel later.
            self._loop.call_later(FIRST_WRITE_TIMEOUT_S, self._cancel)
        self._is_ending = True

    async def read(self) -> bytes | None:
        """The client's next message; None when it has half-closed."""
        message = await self._context.read()
        self._read_at_s = self._loop.time()
        return message if isinstance(message, bytes) else None

    async def read_header(self, message_type: type[_Opening]) -> Any:
        """The header that opens the stream. Raises ProtocolError: MESSAGE_MALFORMED or MESSAGE_OUT_OF_ORDER."""
        self.expecting = True
        self._message_type = message_type
        data = await self.read()
        message = message_type() if data is None else wire.parse(message_type, data)
        if not message.HasField("header"):
            came = "the stream ended" if data is None else "another message came"
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, f"{came} where the header belongs; send the header first")
        header = message.header
        message.ClearField("header")
        if message.ListFields():
            self._beside_header = self._content(message)
        return header

    def content_at_hand(self) -> Content | None:
        """Takes the content that came in the header's own message; None: it had none."""
        content, self._beside_header = self._beside_header, None
        return content

    async def read_content(self) -> Content | None:
        """The index and bytes of the next fragment, or a reference to fragments in shared memory. None when the client
        has half-closed.

        Raises:
            ProtocolError: MESSAGE_MALFORMED or MESSAGE_OUT_OF_ORDER.
        """
        content = self.content_at_hand()
        if content is not None:
            return content
        data = await self.read()
        return None if data is None else self._content(wire.read_fragment(self._message_type, data))

    def _content(self, message: tuple[int, memoryview] | Message) -> Content:
        if not isinstance(message, Message):
            return message
        match message.ListFields():
            case [(field, pb.SharedFragments() as shared)] if field.name == "shared":
                return shared
            case [(field, pb.Fragment() as fragment)] if field.name == "fragment":
                return fragment.index, memoryview(fragment.data)
        raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "another message came where a fragment belongs")

    def count_received(self, size_bytes: int, raw_bytes: int, is_shared: bool = False, is_aside: bool = False) -> None:
        """Counts bytes of fragments that arrived in this call or beside it.

        Args:
            size_bytes: their size.
            raw_bytes: their size if all were raw.
            is_shared: whether they lie in shared memory.
            is_aside: whether they use a data connection.
        """
        self._traffic.received_bytes += size_bytes
        self._traffic.received_raw_bytes += raw_bytes
        self._traffic.shared_bytes += size_bytes if is_shared else 0
        self._traffic.aside_bytes += size_bytes if is_aside else 0

    def count_sent(self, size_bytes: int, raw_bytes: int, is_shared: bool = False, is_aside: bool = False) -> None:
        """Counts bytes of fragments that were sent in this call or beside it.

        Args:
            size_bytes: their size.
            raw_bytes: their size if all were raw.
            is_shared: whether they lie in shared memory.
            is_aside: whether they use a data connection.
        """
        self._traffic.sent_bytes += size_bytes
        self._traffic.sent_raw_bytes += raw_bytes
        self._traffic.shared_bytes += size_bytes if is_shared else 0
        self._traffic.aside_bytes += size_bytes if is_aside else 0

    async def write(self, message: bytes) -> None:
        """Sends one message. Returns when gRPC has room for the next: a slow client holds up only its own call."""
        self._write_began_at_s = self._loop.time()
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:  # gRPC raises this when the client has just gone
            raise asyncio.CancelledError from None
        self._write_began_at_s = None
        if not self._has_written:
            self._has_written = True
            if self.failure is not None:
                raise asyncio.CancelledError  # `fail` has waited for this

    async def write_fragment(self, index: int, parts: Sequence[memoryview]) -> int:
        """Sends one fragment, its parts joined; they are copied before this first waits. Returns its size."""
        size_bytes = sum(map(len, parts))
        await self.write(wire.encode_fragment(index, parts))
        self.count_sent(size_bytes, size_bytes)
        return size_bytes

    async def read_aside(self, aside: Aside, reading: Awaitable[None]) -> None:
        """Waits for bytes that arrive outside the call's stream."""
        self._read_at_s, self._aside = self._loop.time(), aside
        await reading
        self._read_at_s = self._loop.time()

    async def write_aside(self, aside: Aside, writing: Awaitable[None]) -> None:
        """Waits until bytes are sent outside the call's stream."""
        self._aside_began_at_s, self._aside = self._loop.time(), aside
        await writing
        self._aside_began_at_s = None

    async def run(self, main: Coroutine[Any, Any, _T], beside: Coroutine[Any, Any, None]) -> _T:
        """Runs ``main`` to its end, with ``beside`` in a second task; an error in either ends both."""
        task = asyncio.ensure_future(beside)
        try:
            task.add_done_callback(self._beside_ended)
            return await main
        finally:
            main.close()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def end(self) -> None:
        """The call is over; later calls of `fail` have no effect."""
        self._task = None
        self.ended.set_result(None)
        self._watchdog.cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _beside_ended(self, task: asyncio.Future[None]) -> None:
        try:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.fail(error)
        except Exception as error:  # no other code would see it
            self.fail(error)

    def _watch(self) -> None:
        try:
            self._look()
        except Exception as error:  # without this the watchdog would stop silently
            self.fail(error)

    def _look(self) -> None:
        """Fails the call if its client has stalled for too long; otherwise schedules the next check."""
        aside = self._aside
        if aside is not None:
            aside.look()
        heard_at_s = self._read_at_s if aside is None else max(self._read_at_s, aside.heard_at_s)
        since_s = [heard_at_s] if self.expecting else []
        aside_at_s = self._aside_began_at_s
        if aside_at_s is not None and aside is not None:
            aside_at_s = max(aside_at_s, aside.taken_at_s)
        writes = [at_s for at_s in (self._write_began_at_s, aside_at_s) if at_s is not None]
        since_s += writes
        idle_s = self._loop.time() - min(since_s, default=self._loop.time())
        if idle_s < self._stall_timeout_s:
            self._watchdog = self._loop.call_later(self._stall_timeout_s - idle_s, self._watch)
            return
        doing = "reads nothing of what is sent" if writes else "sends nothing"
        why = f"the client {doing} for {self._stall_timeout_s:g} s (--stream-idle-timeout-s)"
        self.fail(refusal(Reason.STREAM_STALLED, f"{why}; call again") if aside is None else aside.stalled(why))
