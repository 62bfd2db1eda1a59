"""One parameter server as the session sees it: fragments out, fragments in, faults as exceptions. The only room of
the client that knows gRPC."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
from numpy.typing import NDArray

from ma_client.lent_memory import Copying, LentMemory, Loan
from ma_client.staging import Staging
from modelaverage import wire
from modelaverage.errors import (
    REASON_METADATA_KEY,
    DeadlineExceededError,
    ModelAverageError,
    ProtocolError,
    ServerUnavailableError,
    fault_named,
)
from modelaverage.outcome import Outcome
from modelaverage.shared_memory import Segment
from modelaverage.tuning import CHANNEL_OPTIONS, keep_freed_memory
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Answer", "Deadline", "FragmentSource", "Shard"]

_log = logging.getLogger("ma_client")

# The bytes of a fragment, as parts to be joined.
FragmentSource = Callable[[int], Iterable[memoryview]]


@dataclass(frozen=True)
class Answer:
    """How a push ended, and where the center lies that came with it."""

    outcome: pb.PushOutcome
    staging: Staging
    loan: Loan | None

    def center(self, copy: bool) -> Mapping[str, NDArray[Any]]:
        """The center variables by name; read-only and only until the next push unless they are copied.

        Raises:
            RetryPushError: a later round has written over them while they were copied.
        """
        if self.loan is None:
            arrays = self.staging.arrays
        else:
            arrays = self.loan.arrays
            self.staging.release()
        if not copy:
            return arrays
        copies = {name: array.copy() for name, array in arrays.items()}
        if self.loan is not None:
            self.loan.check_intact()
        return copies


class Deadline:
    """A time that is set once and left to run over several calls.

    Args:
        timeout_s: how long everything together may take; None: as long as it takes.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it."""
        return self._end_s is not None and time.monotonic() >= self._end_s

    @property
    def left_s(self) -> float | None:
        """What is left of it; never quite nothing, so that gRPC reports what is late."""
        return None if self._end_s is None else max(0.001, self._end_s - time.monotonic())


def _as_is(message: bytes) -> bytes:
    return message


class Shard:
    """A connection to one parameter server.

    Args:
        address: HOST:PORT, or anything that gRPC resolves.
        connect_timeout_s: how long to wait for the server to be there.

    Raises:
        ServerUnavailableError: nobody answered in that time.
    """

    def __init__(self, address: str, connect_timeout_s: float) -> None:
        self.address = address
        self.answered_at_s = time.monotonic()
        """When the server was last heard of, on the monotonic clock."""
        self._lent = LentMemory()
        self._next_push_lent: Segment | None = None  # the contribution memory that the next push may fill at once
        self._next_push_follows = False  # whether its fragments may follow its header at once
        keep_freed_memory()
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._initialize = self._channel.stream_unary(f"/{wire.SERVICE}/Initialize", _as_is, _as_is)
        self._pull = self._channel.unary_stream(f"/{wire.SERVICE}/Pull", _as_is, _as_is)
        self._push = self._channel.stream_stream(f"/{wire.SERVICE}/PushAndAverage", _as_is, _as_is)
        self._leave = self._channel.unary_unary(f"/{wire.SERVICE}/Leave", _as_is, _as_is)
        self._get_status = self._channel.unary_unary(f"/{wire.SERVICE}/GetStatus", _as_is, _as_is)
        try:
            self.status(Deadline(connect_timeout_s), wait_for_ready=True)
        except DeadlineExceededError:
            self.close()
            raise ServerUnavailableError(
                f"no parameter server answers at {address} (waited {connect_timeout_s:g} s); "
                "is `ps-server serve` running there?"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends whatever is under way."""
        self._channel.close()

    def initialize(
        self, header: pb.InitializeHeader, fragments: FragmentSource, fragment_count: int, deadline: Deadline
    ) -> pb.InitializeResponse:
        """Offers initial values; the server may answer before it has taken any."""

        def requests() -> Iterator[bytes]:
            yield pb.InitializeRequest(header=header).SerializeToString()
            for index in range(fragment_count):
                yield wire.encode_fragment(index, fragments(index))

        with self._faults(deadline, "the center was not initialized"):
            answer: bytes = self._initialize(requests(), timeout=deadline.left_s)
        return wire.parse(pb.InitializeResponse, answer)

    def pull(
        self, request: pb.PullRequest, staging_for: Callable[[pb.CenterHeader], Staging], deadline: Deadline
    ) -> None:
        """Reads the center into the staging buffer that ``staging_for`` gives for its header."""
        with self._faults(deadline, "the center was not initialized and sent; is the chief running?"):
            messages = self._pull(request.SerializeToString(), timeout=deadline.left_s)
            try:
                staging = self._receive_center(iter(messages), staging_for)
                self.answered_at_s = time.monotonic()
            finally:
                messages.cancel()  # type: ignore[no-untyped-call]
        staging.check_complete()

    def _receive_center(self, messages: Iterator[bytes], staging_for: Callable[[pb.CenterHeader], Staging]) -> Staging:
        header = wire.read_fragment(pb.PullResponse, next(messages, b""))
        if isinstance(header, tuple) or header.WhichOneof("message") != "header":
            raise ProtocolError(f"{self.address} sent a center without a header; is it a parameter server?")
        staging = staging_for(header.header)
        for data in messages:
            fragment = wire.read_fragment(pb.PullResponse, data)
            if isinstance(fragment, tuple):
                staging.receive(*fragment)
        return staging

    def push_and_average(
        self, header: pb.PushHeader, fragments: FragmentSource, staging: Staging, deadline: Deadline
    ) -> Answer:
        """One push: what the server asks for goes up while what is finished comes down, inline or in shared memory.

        The staging buffer holds the new center only if this returns.
        """
        admitted: queue.SimpleQueue[tuple[int, Loan | None]] = queue.SimpleQueue()
        fragment_count = staging.manifest.fragment_count
        copying = Copying(staging.manifest, fragments)
        # After a push that ended well nothing of this worker is in the round: what the server will ask for is known.
        lent, header.fragments_follow = self._next_push_lent, self._next_push_follows
        self._next_push_lent, self._next_push_follows = None, False
        loan: Loan | None = None

        def inline(first: int) -> Iterator[bytes]:
            for index in range(first, fragment_count):
                yield wire.encode_fragment(index, fragments(index))

        def requests() -> Iterator[bytes]:
            opening = pb.PushAndAverageRequest(header=header).SerializeToString()
            if header.fragments_follow:
                # Messages that stand one after the other are read as one.
                yield opening + next(inline(0), b"")
                yield from inline(1)
                return
            yield opening
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
        with self._faults(deadline, f"the round did not commit (base step {header.base_step})"):
            messages = self._push(requests(), timeout=deadline.left_s)
            try:
                for data in messages:
                    self.answered_at_s = time.monotonic()
                    message = wire.read_fragment(pb.PushAndAverageResponse, data)
                    if isinstance(message, tuple):
                        staging.receive(*message)
                        continue
                    if message.HasField("admission"):
                        loan = self._lent.accept(message.admission, staging.manifest)
                        admitted.put((message.admission.first_needed_fragment, loan))
                    if message.HasField("fragment"):
                        staging.receive(message.fragment.index, memoryview(message.fragment.data))
                    if message.HasField("shared") and loan is not None:
                        staging.receive_elsewhere(message.shared.first, message.shared.count)
                        shared = True
                    if message.HasField("waiting"):
                        _log_waiting(message.waiting)
                    if message.HasField("outcome"):
                        staging.check_complete()
                        if message.outcome.outcome not in {outcome.value for outcome in Outcome}:
                            raise ProtocolError(f"{self.address} sent an outcome that this client does not know")
                        self._next_push_lent = None if loan is None else loan.contribution
                        self._next_push_follows = loan is None and message.outcome.outcome == pb.OUTCOME_COMMITTED
                        return Answer(message.outcome, staging, loan if shared else None)
            finally:
                messages.cancel()  # type: ignore[no-untyped-call]
                admitted.put((fragment_count, None))  # lets the requests end if no admission ever came
                copying.end()
        raise ProtocolError(f"{self.address} ended a push without an outcome; is it a parameter server?")

    def leave(self, worker_id: str, incarnation: bytes, deadline: Deadline) -> None:
        """Says that this process goes."""
        request = pb.LeaveRequest(worker_id=worker_id, incarnation=incarnation).SerializeToString()
        with self._faults(deadline, "nobody said goodbye"):
            self._leave(request, timeout=deadline.left_s)

    def status(self, deadline: Deadline, wait_for_ready: bool = False) -> pb.GetStatusResponse:
        """What the server is doing."""
        request = pb.GetStatusRequest().SerializeToString()
        with self._faults(deadline, "no status came"):
            answer: bytes = self._get_status(request, timeout=deadline.left_s, wait_for_ready=wait_for_ready)
        return wire.parse(pb.GetStatusResponse, answer)

    @contextmanager
    def _faults(self, deadline: Deadline, late: str) -> Iterator[None]:
        """gRPC's errors -> the table's exceptions; ``late`` says what did not happen in time."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._fault(error, deadline, late) from None
        except ValueError as error:
            if "closed" not in str(error):  # gRPC's words for a channel that was closed
                raise
            raise ModelAverageError(f"the session with {self.address} is closed ({error})") from None

    def _fault(self, error: grpc.RpcError, deadline: Deadline, late: str) -> ModelAverageError:
        details = error.details() or ""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            self.answered_at_s = time.monotonic()
        metadata = dict(cast("Iterable[tuple[str, str]]", error.trailing_metadata() or ()))
        fault = fault_named(metadata.get(REASON_METADATA_KEY, ""), details)
        if fault is not None:
            return fault
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED if deadline.timeout_s is not None:
                return DeadlineExceededError(f"{late}: waited {deadline.timeout_s:g} s for {self.address}")
            case grpc.StatusCode.UNAVAILABLE:
                return ServerUnavailableError(
                    f"the parameter server at {self.address} is gone ({details}); local variables are untouched"
                )
            case grpc.StatusCode.INTERNAL if "RST_STREAM" in details:  # so ends a stream whose server was killed
                return ServerUnavailableError(f"the parameter server at {self.address} broke off ({details})")
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServerUnavailableError(f"what answers at {self.address} is no parameter server: {details}")
            case code:
                return ModelAverageError(f"{self.address} answered {code.name}: {details}")


def _log_waiting(waiting: pb.WaitingNotice) -> None:
    missing = [repr(worker_id) for worker_id in waiting.waiting_for]
    if waiting.waiting_for_unknown:
        missing.append(f"{waiting.waiting_for_unknown} not heard of yet")
    _log.warning("the round has waited %.0f s for %s", waiting.round_age_s, ", ".join(missing))
