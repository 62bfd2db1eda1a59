"""One parameter server as the session sees it: the protocol's calls, with messages instead of bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ma_client.transports.calls import Calls
from ma_client.transports.carriers import calls_to
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.pushing import Answer, Pushing
from ma_client.transports.registry import TransportSettings, transports_to
from ma_client.transports.staging import FragmentSource, Staging
from modelaverage import wire
from modelaverage.access.channels import Access
from modelaverage.errors import ProtocolError
from modelaverage.logs import event
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Connection"]

_log = logging.getLogger("ma_client")
# A connection buffers this many bytes before the server must read any of them.
_TAKEN_UNSEEN_BYTES = 1 << 20


class Connection:
    """A connection to one parameter server. Used by one thread at a time, except for `stop`.

    Args:
        address: HOST:PORT or unix:PATH.
        access: how to connect to servers.
        settings: which transports a push may use, and timeouts.

    Attributes:
        calls: the carrier of the calls.
        moved: how many bytes of fragments were sent and received.
    """

    def __init__(self, address: str, access: Access, settings: TransportSettings = TransportSettings()) -> None:  # noqa: B008
        self.address = address
        self.timing = settings.timing
        """Timeouts."""
        self.calls: Calls = calls_to(address, access, settings.timing)
        self.progressed_at_s = self.calls.answered_at_s - 1.0
        """When bytes of a model last arrived, or when enough were sent that the server must have read some."""
        self.moved = LinkBytes()
        self._pushing = Pushing(self.calls, transports_to(self.calls, settings), self.moved)

    @property
    def answered_at_s(self) -> float:
        """When the server last showed a sign of life, on the monotonic clock."""
        return self.calls.answered_at_s

    @property
    def stopped(self) -> threading.Event:
        """Set while any call must end."""
        return self.calls.stopped

    def connect(self, timeout_s: float) -> None:
        """Waits until the server answers.

        Raises:
            ServerUnavailableError: no server answers in that time.
            SecurityError: a server answers, but server and client do not trust each other.
        """
        self.calls.connect(timeout_s)

    def stop(self) -> None:
        """Ends the current call, and calls begun before `stopped` is cleared. From any thread."""
        self.calls.stop()

    def close(self) -> None:
        """Ends the current call and closes the connection."""
        self.calls.close()
        self._pushing.close()

    def initialize(
        self, header: pb.InitializeHeader, fragments: FragmentSource, fragment_count: int, deadline: Deadline
    ) -> pb.InitializeResponse:
        """Sends initial values; the server may answer before it has read any."""

        def requests() -> Iterator[bytes]:
            yield pb.InitializeRequest(header=header).SerializeToString()
            sent_bytes = 0
            for index in range(fragment_count):
                if sent_bytes >= _TAKEN_UNSEEN_BYTES:
                    self._progressed()
                parts = list(fragments(index))
                self.moved.sent += sum(map(len, parts))
                message = wire.encode_fragment(index, parts)
                sent_bytes += len(message)
                yield message

        answer = self.calls.ask("Initialize", requests(), deadline, "the center was not initialized")
        return wire.parse(pb.InitializeResponse, answer)

    def pull(
        self, request: pb.PullRequest, staging_for: Callable[[pb.CenterHeader], Staging], deadline: Deadline
    ) -> None:
        """Reads the center into the staging buffer that ``staging_for`` returns for its header. If the request resumes
        a broken pull, reads only the rest."""
        with self._pulling(request, deadline) as messages:
            staging = staging_for(self._center_header(messages))
            is_first = True
            for data in messages:
                fragment = wire.read_fragment(pb.PullResponse, data)
                if isinstance(fragment, tuple):
                    self._progressed()
                    if is_first and fragment[0] == 0:  # an older server cannot resume a pull and sends everything again
                        staging.begin()
                    staging.receive(*fragment)
                    self.moved.received += len(fragment[1])
                    is_first = False
        staging.check_complete()

    def center_header(self, request: pb.PullRequest, deadline: Deadline) -> pb.CenterHeader:
        """The header of the center, without its values."""
        with self._pulling(request, deadline) as messages:
            return self._center_header(messages)

    @contextmanager
    def _pulling(self, request: pb.PullRequest, deadline: Deadline) -> Iterator[Iterator[bytes]]:
        late = "the center was not initialized and sent; is the chief running?"
        with self.calls.exchange("Pull", request.SerializeToString(), deadline, late) as messages:
            yield iter(messages)

    def _center_header(self, messages: Iterator[bytes]) -> pb.CenterHeader:
        notice_s = self.timing.first_notice_s
        while True:
            header = wire.read_fragment(pb.PullResponse, next(messages, b""))
            if isinstance(header, tuple) or header.WhichOneof("message") != "waiting":
                break
            waited_s = header.waiting.waited_s
            if waited_s >= notice_s:
                notice_s = self.timing.notice_after_s(waited_s)
                what = event("chief_awaited", peer=self.address, waited_s=waited_s)
                _log.warning(
                    "waits for the chief to initialize the center at %s: %.0f s", self.address, waited_s, extra=what
                )
        if isinstance(header, tuple) or header.WhichOneof("message") != "header":
            raise ProtocolError(f"{self.address} sent a center without a header; is it a parameter server?")
        return header.header

    def push_and_average(
        self, header: pb.PushHeader, variables: Sequence[memoryview], staging: Staging, deadline: Deadline
    ) -> Answer:
        """Makes one push; see `Pushing.push`."""
        return self._pushing.push(header, variables, staging, deadline)

    def join(self, request: pb.JoinRequest) -> Iterator[pb.JoinResponse]:
        """The server's messages about this process's task index; open until `stop` or an error."""
        no_deadline = Deadline(None)
        with self.calls.exchange("Join", request.SerializeToString(), no_deadline, "no task index came") as messages:
            for data in messages:
                yield wire.parse(pb.JoinResponse, data)

    def leave(self, request: pb.LeaveRequest, deadline: Deadline) -> pb.LeaveResponse:
        """Says goodbye for this process, and whether it has finished."""
        late = "the server does not know that this worker leaves"
        return wire.parse(pb.LeaveResponse, self.calls.ask("Leave", request.SerializeToString(), deadline, late))

    def status(self, deadline: Deadline) -> pb.GetStatusResponse:
        """The status of the server."""
        request = pb.GetStatusRequest().SerializeToString()
        return wire.parse(pb.GetStatusResponse, self.calls.ask("GetStatus", request, deadline, "no status came"))

    def _progressed(self) -> None:
        self.calls.heard()
        self.progressed_at_s = time.monotonic()
