"""The push loop: carries out the decisions of `push.py`, over any transport."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ma_client.transports.base import ClientLane, ClientTransport, Ending, OutgoingPush
from ma_client.transports.calls import Calls, Requests
from ma_client.transports.lent_memory import Loan
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.messages import ClientMessagesLane
from ma_client.transports.push import AwaitRest, ClientPush, Decide, Done, PushFailed
from ma_client.transports.staging import Staging
from ma_client.values.reused import ReusedMemory
from ma_client.values.same import PushedBytes
from modelaverage import wire
from modelaverage.codecs import RAW, Codec, codec_named
from modelaverage.errors import ModelAverageError, ProtocolError
from modelaverage.logs import event
from modelaverage.missing import Missing
from modelaverage.names import listed
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Answer", "Pushing"]

_log = logging.getLogger("ma_client")


@dataclass(frozen=True)
class Answer:
    """The outcome of a push, and the location of the center that it returned.

    Args:
        outcome: the outcome from the server.
        loan: the shared memory that holds the center; None: it is in the staging buffer.
    """

    outcome: pb.PushOutcome
    loan: Loan | None

    def elsewhere(self, memory: ReusedMemory | None) -> Mapping[str, NDArray[Any]] | None:
        """The center variables by name, if they did not arrive in the staging buffer.

        Args:
            memory: where to copy them; None: they are not copied, read-only, and valid until the next push.

        Raises:
            RetryPushError: a later round overwrote them during the copy.
        """
        if self.loan is None or memory is None:
            return None if self.loan is None else self.loan.arrays
        copies = memory.copies(self.loan.arrays)
        self.loan.check_intact()
        return copies


class Pushing:
    """Makes the pushes to one server, one after another.

    Args:
        calls: the carrier of calls to the server.
        transports: the transports besides messages, in the order in which a push tries them.
        moved: counts the bytes of fragments.
    """

    def __init__(self, calls: Calls, transports: Sequence[ClientTransport], moved: LinkBytes) -> None:
        self._calls = calls
        self._moved = moved
        self._transports = transports
        self._may_follow = False  # whether the next push may send fragments before its admission

    def push(
        self, header: pb.PushHeader, variables: Sequence[memoryview], staging: Staging, deadline: Deadline
    ) -> Answer:
        """Makes one push: sends the requested fragments while receiving the finished ones.

        The staging buffer holds the new center only if this returns, unless the answer has a loan. If the push fails
        and its codec has a base, the staging buffer still holds that.

        Args:
            header: the push header, without the fields of transports. A codec other than `raw` needs a whole center in
                the staging buffer.
            variables: the bytes of the local variables, in manifest order.
            staging: receives the center.
            deadline: for the whole push.
        """
        request = pb.PushAndAverageRequest(header=header)  # a copy, because a retry may use another transport
        has_fragments = header.purpose != pb.PURPOSE_ABSTAIN
        # After a successful push, the round has nothing of this worker, so the server will need all fragments.
        may_follow, self._may_follow = self._may_follow and has_fragments, False
        codec = codec_named(header.codec)
        if not isinstance(variables, PushedBytes):
            variables = PushedBytes(variables)
        opening = OutgoingPush(header.push_id, variables, staging, codec, has_fragments, may_follow, self._moved)
        staging.begin(keeps_old=not codec.in_place)
        lanes = _PushLanes(opening, self._begun(opening))
        try:
            self._announce(lanes, request.header)
            answer = Answer(self._call(request, lanes, deadline), lanes.lane.loan)
            if answer.loan is not None:
                staging.roll_back()  # its first fragments may have come in messages; this push may have to be repeated
            staging.is_filled()
            lanes.is_done = True
            return answer
        except ModelAverageError as fault:
            instead = lanes.end(fault, self._calls.stopped.is_set())
            if instead is not None:
                raise instead from None
            for transport in self._transports:
                transport.failed(fault)
            raise
        finally:
            lanes.end(None, self._calls.stopped.is_set())
            if not lanes.is_done:
                staging.roll_back()

    def close(self) -> None:
        """Closes the transports; no push follows."""
        for transport in self._transports:
            transport.close()

    def _announce(self, lanes: _PushLanes, header: pb.PushHeader) -> None:
        is_free = isinstance(lanes.lane, ClientMessagesLane)
        for transport in self._transports:
            transport.announce(header, lanes.opening, is_free)
        lanes.lane.announce(header)

    def _begun(self, opening: OutgoingPush) -> ClientLane | None:
        """Opens a lane on the first transport that accepts the push; None: it begins in messages."""
        for transport in self._transports:
            lane = transport.begin(opening)
            if lane is not None:
                return lane
        return None

    def _call(self, request: pb.PushAndAverageRequest, lanes: _PushLanes, deadline: Deadline) -> pb.PushOutcome:
        """Makes the call of a push, which opens with this request."""
        fragment_count = lanes.opening.manifest.fragment_count
        requests = _Requests(request, lanes.lane, fragment_count <= 1)
        push = ClientPush(self._calls.address, fragment_count, lanes.lane.is_beside)
        late = f"the round did not commit (base step {requests.base_step}); push again to go on waiting"
        try:
            with self._calls.exchange("PushAndAverage", requests.all(), deadline, late) as call:
                lanes.lane.begun(call.cancel)
                for data in call:
                    outcome = self._take(data, push, lanes, requests, deadline)
                    if outcome is not None:
                        return outcome
                _carried_out(push.ended())
        finally:
            requests.end()  # after the call, which would half-close otherwise
        raise AssertionError("a push ends with an outcome or an exception")

    def _take(
        self, data: bytes, push: ClientPush, lanes: _PushLanes, requests: _Requests, deadline: Deadline
    ) -> pb.PushOutcome | None:
        """Handles one message of the server; returns the outcome if the push is done."""
        message = wire.read_fragment(pb.PushAndAverageResponse, data)
        if isinstance(message, tuple):
            self._keep(push, lanes, *message)
            return None
        if message.HasField("admission"):
            _carried_out(push.admitted(message.admission.first_needed_fragment))
            self._admit(message.admission, lanes)
            requests.admit(message.admission.first_needed_fragment, lanes.lane)
        if message.HasField("fragment"):
            self._keep(push, lanes, message.fragment.index, memoryview(message.fragment.data))
        elsewhere = lanes.lane.down(message)
        if elsewhere is not None:
            _carried_out(push.came(*elsewhere))
            first, count = elsewhere
            self._moved.received += RAW.run_size_bytes(lanes.opening.manifest, first, first + count)
        if message.HasField("waiting"):
            _log_waiting(message.waiting, requests.base_step)
        if not message.HasField("outcome"):
            return None
        decided = _carried_out(push.told(message.outcome.outcome))
        if isinstance(decided, AwaitRest):
            problem = lanes.lane.rest(lambda: not deadline.is_over and not self._calls.stopped.is_set())
            decided = _carried_out(push.rest_ended(problem))
        assert isinstance(decided, Done)
        self._may_follow = decided.may_follow
        return message.outcome

    def _admit(self, admission: pb.PushAdmission, lanes: _PushLanes) -> None:
        """Passes the offers to the transports. One may take over the fragments if none have been sent."""
        if admission.codec not in ("", lanes.opening.codec.name):
            raise ProtocolError(
                f"{self._calls.address} sends its center in codec {admission.codec[:40]!a}; this push is in "
                f"{lanes.opening.codec.name}"
            )
        lanes.codec_down = codec_named(admission.codec)
        is_free = True
        for transport in self._transports:
            lane = transport.admitted(admission, is_free)
            if lane is not None and is_free:
                is_free = False
                lanes.change_to(lane)
        if is_free:
            lanes.change_to(None)

    @staticmethod
    def _keep(push: ClientPush, lanes: _PushLanes, index: int, data: memoryview) -> None:
        staging, codec = lanes.opening.staging, lanes.codec_down
        _carried_out(push.came(index, staging.count(index, data, codec)))
        staging.put(index, data, codec)
        lanes.opening.moved.received += len(data)


class _PushLanes:
    """The lanes of one push: the one on which it began and the one that carries its fragments."""

    def __init__(self, opening: OutgoingPush, begun: ClientLane | None) -> None:
        self.opening = opening
        self.is_done = False
        self.codec_down: Codec = RAW  # of the center in messages; the admission says otherwise
        self._messages = ClientMessagesLane(opening)
        self.lane: ClientLane = self._messages if begun is None else begun
        self._lanes = [self.lane]

    def change_to(self, lane: ClientLane | None) -> None:
        """Switches the fragments to a lane chosen by the admission; None: to messages."""
        if not self.lane.at_once:
            self.lane = self._messages if lane is None else lane
        if lane is not None and lane not in self._lanes:
            self._lanes.append(lane)

    def end(self, fault: ModelAverageError | None, is_stopped: bool) -> ModelAverageError | None:
        """Ends all lanes. Returns a more precise exception to raise instead of the fault, if a lane has one."""
        lanes, self._lanes = self._lanes, []
        ending, instead = Ending(fault, self.is_done, is_stopped), None
        for lane in lanes:
            error = lane.end(ending)
            instead = error if instead is None else instead
        return instead


class _Requests:
    """The messages that the call sends.

    Args:
        opening: has the header.
        lane: the lane on which the push begins.
        is_small: whether the model has at most one fragment.
    """

    def __init__(self, opening: pb.PushAndAverageRequest, lane: ClientLane, is_small: bool) -> None:
        self.base_step = opening.header.base_step
        self._opening = opening.SerializeToString()
        self._is_small = is_small
        self._lane = lane
        self._admitted: queue.SimpleQueue[tuple[int, ClientLane] | None] = queue.SimpleQueue()

    def all(self) -> Requests:
        """The header, then the fragments. A single message is returned as such: a stream takes a thread of gRPC's."""
        lane = self._lane
        if lane.at_once and (lane.is_beside or self._is_small):
            return self._opening + b"".join(lane.up(0))
        return self._messages()

    def _messages(self) -> Iterator[bytes]:
        lane = self._lane
        if lane.at_once:
            # Concatenated protobuf messages parse as one merged message.
            messages = lane.up(0)
            yield self._opening + next(messages, b"")
            yield from messages
            return
        yield self._opening
        while self._admitted.empty() and lane.prepare():
            pass
        admitted = self._admitted.get()
        if admitted is not None:
            first, lane = admitted
            yield from lane.up(first)

    def admit(self, first: int, lane: ClientLane) -> None:
        """Sends the fragments from this one on over this lane."""
        self._admitted.put((first, lane))

    def end(self) -> None:
        """Ends the requests: nothing more is needed."""
        self._admitted.put(None)


def _carried_out(decided: Decide) -> Decide:
    """Returns the decision, or raises if it is a failure."""
    if isinstance(decided, PushFailed):
        raise decided.error
    return decided


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
    whom = missing.text() if missing else "the server: all pushes are in, and its checkpoint is being written"
    if waiting.finished:
        gone = listed(waiting.finished, waiting.finished_omitted)
        have = "has" if len(waiting.finished) + waiting.finished_omitted == 1 else "have"
        whom += f"; {gone} {have} finished, rounds go on with {waiting.workers_training}"
    _log.warning("the round has waited %.0f s for %s", waiting.round_age_s, whom, extra=what)
