"""One parameter server as the session sees it: fragments out, fragments in, faults as exceptions. The only room of
the client that knows gRPC."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from numpy.typing import NDArray

from ma_client.process.threads import is_about_threads, keep_for_ever, without_thread
from ma_client.transports.data_connection import DATA_SETTINGS, DataSettings, Transfer
from ma_client.transports.data_link import DataLink
from ma_client.transports.lent_memory import Copying, LentMemory, Loan
from ma_client.transports.reach import Reach
from ma_client.transports.staging import Staging
from modelaverage import wire
from modelaverage.access import proxies
from modelaverage.access.channels import Access
from modelaverage.errors import (
    DeadlineExceededError,
    ModelAverageError,
    ProtocolError,
    Reason,
    RetryPushError,
    SecurityError,
    ServerUnavailableError,
    fault_told,
)
from modelaverage.logs import event
from modelaverage.missing import Missing
from modelaverage.names import listed
from modelaverage.outcome import Outcome
from modelaverage.runtime.deadline import Deadline
from modelaverage.runtime.shared_memory import Segment
from modelaverage.runtime.tuning import CHANNEL_OPTIONS, connecting_for, keep_freed_memory
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Answer", "FragmentSource", "Shard"]

_log = logging.getLogger("ma_client")

# How long a server may be silent at first before it is asked whether there is trouble with certificates; doubled then.
_FIRST_LOOK_S = 0.5
# Before the next look at one that is going down.
_PAUSE_S = 0.1
# How long a pull has waited for the chief when it is said first.
_FIRST_NOTICE_S = 5.0
_READY = grpc.ChannelConnectivity.READY.value[0]
# A connection takes so much before the server has to read any of it.
_TAKEN_UNSEEN_BYTES = 1 << 20
# So ends a push whose bytes got stuck beside it; by other reasons, it is the round's or the server's fault.
_STUCK = (None, Reason.DATA_CONNECTION_LOST, Reason.STREAM_STALLED)

# The bytes of a fragment, as parts to be joined.
FragmentSource = Callable[[int], Iterable[memoryview]]


@dataclass(frozen=True)
class Answer:
    """How a push ended, and where the center lies that came with it.

    Args:
        outcome: the server's last word.
        loan: the shared memory that the center lies in; None: it lies in the staging buffer.
    """

    outcome: pb.PushOutcome
    loan: Loan | None

    def elsewhere(self, copy: bool) -> Mapping[str, NDArray[Any]] | None:
        """The center variables by name if they did not arrive in the staging buffer; read-only and only until the next
        push unless they are copied.

        Raises:
            RetryPushError: a later round has written over them while they were copied.
        """
        if self.loan is None or not copy:
            return None if self.loan is None else self.loan.arrays
        copies = {name: array.copy() for name, array in self.loan.arrays.items()}
        self.loan.check_intact()
        return copies


def _as_is(message: bytes) -> bytes:
    return message


class Shard:
    """A connection to one parameter server. For one thread at a time, but for `stop`.

    Args:
        address: HOST:PORT or unix:PATH.
        access: the way to servers.
        data: when to use data connections.

    Attributes:
        stopped: set while whatever is under way has to end.
    """

    def __init__(self, address: str, access: Access, data: DataSettings = DATA_SETTINGS) -> None:
        self.address = address
        self._access = access
        self.answered_at_s = time.monotonic()
        """When the server was last heard of, on the monotonic clock."""
        self.progressed_at_s = self.answered_at_s - 1.0
        """When bytes of a model last came, or went so far that the server must have taken some."""
        self.stopped = threading.Event()
        self._reach = Reach(address)
        self._under_way: grpc.Call | None = None
        self._lent = LentMemory()
        self._next_push_lent: Segment | None = None  # the contribution memory that the next push may fill at once
        self._next_push_follows = False  # whether its fragments may follow its header at once
        self._data = DataLink(address, access.is_encrypted(address), data)
        keep_freed_memory()
        self._open_channel()

    def _open_channel(self) -> None:
        self._channel_lacks_thread = self._channel_is_lost = False
        options = [*CHANNEL_OPTIONS, connecting_for(self._reach.attempt_s)]
        self._channel = self._access.channel(self.address, options)
        self._initialize = self._channel.stream_unary(f"/{wire.SERVICE}/Initialize", _as_is, _as_is)
        self._pull = self._channel.unary_stream(f"/{wire.SERVICE}/Pull", _as_is, _as_is)
        self._push = self._channel.stream_stream(f"/{wire.SERVICE}/PushAndAverage", _as_is, _as_is)
        self._join = self._channel.unary_stream(f"/{wire.SERVICE}/Join", _as_is, _as_is)
        self._leave = self._channel.unary_unary(f"/{wire.SERVICE}/Leave", _as_is, _as_is)
        self._get_status = self._channel.unary_unary(f"/{wire.SERVICE}/GetStatus", _as_is, _as_is)

    def connect(self, timeout_s: float) -> None:
        """Waits for the server to be there.

        Raises:
            ServerUnavailableError: nobody answers in that time.
            SecurityError: somebody does, but server and client do not trust each other.
        """
        deadline, look_s = Deadline(timeout_s), _FIRST_LOOK_S
        while True:
            try:
                self.status(Deadline(min(look_s, deadline.left_s or 0.0)), wait_for_ready=True)
                return
            except DeadlineExceededError:
                self._not_reached(look_s)
                distrust = self._access.problem(self.address)
                if distrust is not None:
                    raise SecurityError(distrust) from None
            except ServerUnavailableError as error:
                # One that is going down; the next may come. What is no parameter server stays none.
                if error.status == grpc.StatusCode.UNIMPLEMENTED.name or self.stopped.wait(_PAUSE_S):
                    raise
            if deadline.is_over:
                raise ServerUnavailableError(
                    f"no parameter server answers at {self.address} (waited {timeout_s:g} s); "
                    f"is `ps-server serve` running there?{proxies.in_the_way(self.address)}"
                )
            look_s *= 2

    def stop(self) -> None:
        """Ends the call that is under way, and those that are begun until `stopped` is cleared. From any thread."""
        self.stopped.set()
        call = self._under_way
        if call is not None:
            call.cancel()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends whatever is under way."""
        if not self._channel_lacks_thread:
            self._channel.close()
        self._data.close()

    def initialize(
        self, header: pb.InitializeHeader, fragments: FragmentSource, fragment_count: int, deadline: Deadline
    ) -> pb.InitializeResponse:
        """Offers initial values; the server may answer before it has taken any."""

        def requests() -> Iterator[bytes]:
            yield pb.InitializeRequest(header=header).SerializeToString()
            sent_bytes = 0
            for index in range(fragment_count):
                if sent_bytes >= _TAKEN_UNSEEN_BYTES:
                    self._progressed()
                message = wire.encode_fragment(index, fragments(index))
                sent_bytes += len(message)
                yield message

        with self._faults(deadline, "the center was not initialized"):
            call = self._initialize.future(requests(), timeout=deadline.left_s, metadata=self._access.metadata)
            with self._ending(call):
                answer: bytes = call.result()
            self._answered()
        return wire.parse(pb.InitializeResponse, answer)

    def pull(
        self, request: pb.PullRequest, staging_for: Callable[[pb.CenterHeader], Staging], deadline: Deadline
    ) -> None:
        """Reads the center into the staging buffer that ``staging_for`` gives for its header; the rest of it, if the
        request goes on with a pull that broke."""
        with self._pulling(request, deadline) as messages:
            staging = staging_for(self._center_header(messages))
            is_first = True
            for data in messages:
                fragment = wire.read_fragment(pb.PullResponse, data)
                if isinstance(fragment, tuple):
                    self._progressed()
                    if is_first and fragment[0] == 0:  # a server of before pulls went on sends all of it again
                        staging.begin()
                    staging.receive(*fragment)
                    is_first = False
        staging.check_complete()

    def center_header(self, request: pb.PullRequest, deadline: Deadline) -> pb.CenterHeader:
        """What the center is, without its values."""
        with self._pulling(request, deadline) as messages:
            return self._center_header(messages)

    @contextmanager
    def _pulling(self, request: pb.PullRequest, deadline: Deadline) -> Iterator[Iterator[bytes]]:
        with self._faults(deadline, "the center was not initialized and sent; is the chief running?"):
            messages = self._pull(request.SerializeToString(), timeout=deadline.left_s, metadata=self._access.metadata)
            with self._ending(messages):
                yield iter(messages)

    def _center_header(self, messages: Iterator[bytes]) -> pb.CenterHeader:
        notice_s = _FIRST_NOTICE_S
        while True:
            header = wire.read_fragment(pb.PullResponse, next(messages, b""))
            self._answered()
            if isinstance(header, tuple) or header.WhichOneof("message") != "waiting":
                break
            waited_s = header.waiting.waited_s
            if waited_s >= notice_s:
                notice_s = 2 * waited_s + _FIRST_NOTICE_S
                what = event("chief_awaited", peer=self.address, waited_s=waited_s)
                _log.warning(
                    "waits for the chief to initialize the center at %s: %.0f s", self.address, waited_s, extra=what
                )
        if isinstance(header, tuple) or header.WhichOneof("message") != "header":
            raise ProtocolError(f"{self.address} sent a center without a header; is it a parameter server?")
        return header.header

    def push_and_average(
        self, header: pb.PushHeader, fragments: FragmentSource, staging: Staging, deadline: Deadline
    ) -> Answer:
        """One push: what the server asks for goes up while what is finished comes down, inline, on a data connection or
        in shared memory.

        The staging buffer holds the new center only if this returns.
        """
        admitted: queue.SimpleQueue[tuple[int, Loan | None]] = queue.SimpleQueue()
        fragment_count = staging.manifest.fragment_count
        copying = Copying(staging.manifest, fragments)
        # After a push that ended well nothing of this worker is in the round: what the server will ask for is known.
        lent, follows = self._next_push_lent, self._next_push_follows
        self._next_push_lent, self._next_push_follows = None, False
        loan: Loan | None = None

        def inline(first: int) -> Iterator[bytes]:
            # One by one: a run would hold up the average of its first fragment until its last has come.
            for index in range(first, fragment_count):
                yield wire.encode_fragment(index, fragments(index))

        def requests() -> Iterator[bytes]:
            opening = pb.PushAndAverageRequest(header=header).SerializeToString()
            if header.fragments_follow:
                # Messages that stand one after the other are read as one.
                messages = inline(0)
                yield opening + next(messages, b"")
                yield from messages
                return
            yield opening
            if header.uses_data_connection:
                return
            filled = 0
            while lent is not None and filled < fragment_count and admitted.empty() and not copying.over:
                filled = copying.fill(lent, filled)
            first, loan = admitted.get()
            if loan is None:
                yield from inline(first)
                return
            if loan.contribution is not lent:
                filled = first
            while first < fragment_count:
                if filled <= first:
                    filled = copying.fill(loan.contribution, first)
                if copying.over:
                    return
                put = pb.SharedFragments(first=first, count=filled - first)
                yield pb.PushAndAverageRequest(shared=put).SerializeToString()
                first = filled

        staging.begin()
        shared = False
        late = f"the round did not commit (base step {header.base_step})"
        # Bytes go before the call: the server finds them when it has read the header.
        with (
            self._transferring(follows, header.push_id, fragments, staging) as transfer,
            self._faults(deadline, late),
        ):
            header.uses_data_connection, header.fragments_follow = transfer is not None, follows and transfer is None
            header.accepts_data_connection = (
                lent is None and transfer is None and self._data.wants(staging.manifest.buffer_size_bytes)
            )
            messages = self._push(requests(), timeout=deadline.left_s, metadata=self._access.metadata)
            try:
                self._begin(messages)
                if transfer is not None:
                    transfer.give_up = messages.cancel
                for data in messages:
                    self._answered()
                    message = wire.read_fragment(pb.PushAndAverageResponse, data)
                    if isinstance(message, tuple):
                        staging.receive(*message)
                        continue
                    if message.HasField("admission"):
                        loan = self._lent.accept(message.admission, staging.manifest)
                        admitted.put((message.admission.first_needed_fragment, loan))
                        offered = message.admission.HasField("data_connection")
                        if offered and header.accepts_data_connection and loan is None:
                            self._data.open(message.admission.data_connection)
                    if message.HasField("fragment"):
                        staging.receive(message.fragment.index, memoryview(message.fragment.data))
                    if message.HasField("shared") and loan is not None:
                        staging.receive_elsewhere(message.shared.first, message.shared.count)
                        shared = True
                    if message.HasField("waiting"):
                        _log_waiting(message.waiting, header.base_step)
                    if message.HasField("outcome"):
                        if transfer is not None and not staging.is_complete:
                            committed = message.outcome.outcome == pb.OUTCOME_COMMITTED
                            if not committed or not transfer.wait(lambda: not self._is_over(deadline)):
                                raise RetryPushError(f"the center did not come from {self.address}: {transfer.problem}")
                        staging.check_complete()
                        if message.outcome.outcome not in {outcome.value for outcome in Outcome}:
                            raise ProtocolError(f"{self.address} sent an outcome that this client does not know")
                        self._next_push_lent = None if loan is None else loan.contribution
                        self._next_push_follows = loan is None and message.outcome.outcome == pb.OUTCOME_COMMITTED
                        return Answer(message.outcome, loan if shared else None)
            finally:
                self._end(messages)
                admitted.put((fragment_count, None))  # lets the requests end if no admission ever came
                copying.end()
        raise ProtocolError(f"{self.address} ended a push without an outcome; is it a parameter server?")

    @contextmanager
    def _transferring(
        self, may_use_it: bool, push_id: int, fragments: FragmentSource, staging: Staging
    ) -> Iterator[Transfer | None]:
        """A push's bytes move on the data connection meanwhile, if there is one."""
        transfer = self._begin_transfer(push_id, fragments, staging) if may_use_it else None
        stuck: ModelAverageError | None = None
        try:
            yield transfer
        except ServerUnavailableError as error:
            if transfer is not None and transfer.gave_up:
                # The server is there, but not on this way.
                stuck = RetryPushError(f"the data connection to {self.address} broke: {transfer.problem}")
                raise stuck from None
            if error.reason is None:
                self._data.server_was_away()
            raise
        except (RetryPushError, DeadlineExceededError) as error:
            stuck = error if error.reason in _STUCK and not self.stopped.is_set() else None
            raise
        finally:
            if transfer is not None:
                transfer.end()
                if transfer.is_whole:
                    self._data.put(transfer.connection)
                elif stuck is not None:
                    self._data.give_up(stuck)

    def _begin_transfer(self, push_id: int, fragments: FragmentSource, staging: Staging) -> Transfer | None:
        connection = self._data.take()
        if connection is None:
            return None
        transfer = Transfer(connection, push_id, fragments, staging)
        try:
            transfer.start()
        except RuntimeError as error:
            transfer.end()
            self._data.give_up(without_thread(f"nothing moves on the data connection to {self.address}", error))
            return None
        except BaseException:
            transfer.end()
            raise
        return transfer

    def join(self, request: pb.JoinRequest) -> Iterator[pb.JoinResponse]:
        """What the server says of this process's task index; open until `stop` or a fault."""
        with self._faults(Deadline(None), "no task index came"):
            messages = self._join(request.SerializeToString(), metadata=self._access.metadata)
            with self._ending(messages):
                for data in messages:
                    yield wire.parse(pb.JoinResponse, data)

    def leave(self, request: pb.LeaveRequest, deadline: Deadline) -> pb.LeaveResponse:
        """Says that this process goes, and whether it has finished."""
        with self._faults(deadline, "the server does not know that this worker goes"):
            call = self._leave.future(
                request.SerializeToString(), timeout=deadline.left_s, metadata=self._access.metadata
            )
            with self._ending(call):
                answer: bytes = call.result()
        return wire.parse(pb.LeaveResponse, answer)

    def status(self, deadline: Deadline, wait_for_ready: bool = False) -> pb.GetStatusResponse:
        """What the server is doing."""
        request = pb.GetStatusRequest().SerializeToString()
        with self._faults(deadline, "no status came"):
            call = self._get_status.future(
                request, timeout=deadline.left_s, wait_for_ready=wait_for_ready, metadata=self._access.metadata
            )
            with self._ending(call):
                answer: bytes = call.result()
            self._answered()
        return wire.parse(pb.GetStatusResponse, answer)

    def _answered(self) -> None:
        self.answered_at_s = time.monotonic()
        self._reach.answered()

    def _progressed(self) -> None:
        self._answered()
        self.progressed_at_s = self.answered_at_s

    def _not_reached(self, lasted_s: float) -> None:
        if self._reach.failed(lasted_s):
            self._channel_is_lost = True  # a new one makes longer attempts

    def _is_connected(self) -> bool:
        # gRPC has no public way to ask: `subscribe` has a thread that may keep the process from its end (1.85).
        state = getattr(getattr(self._channel, "_channel", None), "check_connectivity_state", lambda _: _READY)
        try:
            return bool(state(False) == _READY)
        except ValueError:  # it is closed
            return True

    def _another_way(self) -> None:
        """The server is there, and what is under way does not get through. From any thread."""
        self._channel_is_lost = True
        call = self._under_way
        if call is not None:
            call.cancel()  # type: ignore[no-untyped-call]

    def _is_over(self, deadline: Deadline) -> bool:
        return deadline.is_over or self.stopped.is_set()

    def _begin(self, call: grpc.Call) -> None:
        self._under_way = call
        if self.stopped.is_set():
            call.cancel()  # type: ignore[no-untyped-call]

    def _end(self, call: grpc.Call) -> None:
        self._under_way = None
        call.cancel()  # type: ignore[no-untyped-call]

    @contextmanager
    def _ending(self, call: grpc.Call) -> Iterator[None]:
        """The call ends with this context, or when `stop` says so."""
        try:
            self._begin(call)
            yield
        finally:
            self._end(call)

    @contextmanager
    def _faults(self, deadline: Deadline, late: str) -> Iterator[None]:
        """gRPC's errors -> the table's exceptions; ``late`` says what did not happen in time."""
        began_s = time.monotonic()
        try:
            if self._channel_lacks_thread or self._channel_is_lost:
                self._replace_channel()
            with self._reach.looking(self._another_way, self._is_connected):
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
            raise ModelAverageError(f"the call to {self.address} was ended here") from None
        except RuntimeError as error:
            if not is_about_threads(error):
                raise
            self._abandon_channel()
            raise without_thread(f"no call to {self.address} can be made", error) from None
        except MemoryError:
            self._abandon_channel()  # perhaps it was for a thread
            raise
        except ValueError as error:
            if "closed" not in str(error):  # gRPC's words for a channel that was closed
                raise
            raise ModelAverageError(f"the session with {self.address} is closed ({error})") from None

    def _abandon_channel(self) -> None:
        """gRPC had no thread for the channel: whatever is called on it, even its close, hangs."""
        self._channel_lacks_thread = True
        keep_for_ever(self._channel)  # or its end would close it

    def _replace_channel(self) -> None:
        """Raises RuntimeError: there are no threads for a new one."""
        if not self._channel_lacks_thread:
            self._channel.close()
        probe = threading.Thread(target=lambda: None)  # better this one fails than the new channel's
        probe.start()
        probe.join()
        self._open_channel()

    def _is_elsewhere(self) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"the parameter server at {self.address} is there again, perhaps at another address"
        )

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
            case grpc.StatusCode.INTERNAL if "RST_STREAM" in details:  # so ends a stream whose server was killed
                return ServerUnavailableError(f"the parameter server at {self.address} broke off ({details})")
            case grpc.StatusCode.CANCELLED if self._channel_is_lost and not self.stopped.is_set():
                return self._is_elsewhere()
            case grpc.StatusCode.CANCELLED if not self.stopped.is_set():  # a server going down had not begun with it
                return ServerUnavailableError(f"the parameter server at {self.address} broke off ({details})")
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServerUnavailableError(f"what answers at {self.address} is no parameter server: {details}")
            case code:
                return ModelAverageError(f"{self.address} answered {code.name}: {details}")


def _log_waiting(waiting: pb.WaitingNotice, step: int) -> None:
    missing = Missing.told(waiting)
    what = event(
        "round_waits",
        round=step,
        waited_s=waiting.round_age_s,
        waiting_for=missing.names,
        waiting_for_omitted=missing.omitted,
        waiting_for_unknown=missing.unknown,
    )
    whom = missing.text() if missing else "the server: all pushes are there, and its checkpoint is being written"
    if waiting.finished:
        gone = listed(waiting.finished, waiting.finished_omitted)
        have = "has" if len(waiting.finished) + waiting.finished_omitted == 1 else "have"
        whom += f"; {gone} {have} finished, rounds go on with {waiting.workers_training}"
    _log.warning("the round has waited %.0f s for %s", waiting.round_age_s, whom, extra=what)
