"""The rules of one push, from its header to its end. Pure: events in, decisions out; no I/O, no clock, no threads.

A push is OPENED when its header is sent, ADMITTED when the server has said which fragments it needs, CLOSING when the
outcome has arrived before the last bytes outside the call, and finally DONE or FAILED. If the server breaks the
protocol, the push fails with ProtocolError and the received center is discarded.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from modelaverage.errors import ModelAverageError, ProtocolError, Reason, RetryPushError, ServerUnavailableError
from modelaverage.outcome import Outcome

__all__ = ["AwaitRest", "ClientPush", "Decide", "Done", "Keep", "PushFailed", "Retry", "Send", "State", "retry_after"]

_OUTCOMES = {outcome.value: outcome for outcome in Outcome}  # by number on the wire


class State(enum.Enum):
    """The state of a push."""

    OPENED = "the header was sent"
    ADMITTED = "fragments are sent and received"
    CLOSING = "the outcome has arrived, but not yet the last bytes outside the call"
    DONE = "the center is complete and may be used"
    FAILED = "nothing received may be used"


class Retry(enum.Enum):
    """Whether the same push may be made again."""

    AT_ONCE = "the server is reachable; the push is not in the round, or its answer was lost"
    LATER = "once the server is back"
    NO = "it would fail again"


@dataclass(frozen=True)
class Send:
    """Send the fragments from this one on."""

    first: int


@dataclass(frozen=True)
class Keep:
    """Store these next fragments of the center; they become valid when the push is done."""

    first: int
    count: int


@dataclass(frozen=True)
class AwaitRest:
    """Wait for the bytes outside the call, then call `ClientPush.rest_ended`."""


@dataclass(frozen=True)
class Done:
    """The center is complete.

    Args:
        outcome: the outcome of the push.
        may_follow: whether the server will need all fragments of the next push, which therefore need not wait for its
            admission.
    """

    outcome: Outcome
    may_follow: bool


@dataclass(frozen=True)
class PushFailed:
    """The push has failed; there is no center."""

    error: ModelAverageError

    @property
    def retry(self) -> Retry:
        """Whether the same push may be made again."""
        return retry_after(self.error)


Decide = Send | Keep | AwaitRest | Done | PushFailed


class ClientPush:
    """One push to one server.

    Args:
        peer: the server's address, for messages.
        fragment_count: the number of fragments of the center.
        beside: whether fragments and center travel outside the call.
    """

    def __init__(self, peer: str, fragment_count: int, beside: bool = False) -> None:
        self.state = State.OPENED
        self.received = 0
        """How many fragments of the center have arrived, in order."""
        self._peer = peer
        self._fragment_count = fragment_count
        self._beside = beside
        self._outcome: Outcome | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is DONE or FAILED; no event changes anything then."""
        return self.state in (State.DONE, State.FAILED)

    def admitted(self, first_needed: int) -> Decide:
        """The server needs the fragments from this one on."""
        if self.state is not State.OPENED:
            return self._broken("admitted a push twice")
        if first_needed > self._fragment_count:
            return self._broken(f"asked for fragment {first_needed} of {self._fragment_count}")
        self.state = State.ADMITTED
        return Send(first_needed)

    def came(self, first: int, count: int) -> Decide:
        """The server has sent these fragments of the center, in the call or in lent memory."""
        if self.state is not State.ADMITTED:
            return self._broken(f"sent fragment {first} before the admission")
        if first != self.received or not 0 < count <= self._fragment_count - first:
            return self._broken(f"sent {count} fragments from {first} on where {self.received} belongs")
        self.received += count
        return Keep(first, count)

    def told(self, outcome: int) -> Decide:
        """The server has sent the outcome, given as its number on the wire."""
        if self.state is not State.ADMITTED:
            return self._broken("sent an outcome before the admission")
        if outcome not in _OUTCOMES:
            return self._broken("sent an outcome that this client does not know")
        self._outcome = _OUTCOMES[outcome]
        if self.received == self._fragment_count:
            return self._done()
        if not self._beside:
            return self._broken(f"sent {self.received} of {self._fragment_count} fragments")
        if self._outcome is not Outcome.COMMITTED:
            return self.failed(RetryPushError(f"the center did not come from {self._peer}"))
        self.state = State.CLOSING
        return AwaitRest()

    def rest_ended(self, problem: object | None) -> Decide:
        """The wait for bytes outside the call has ended. ``problem``: why it failed; None: all bytes have arrived."""
        if self.state is not State.CLOSING:
            return self._broken("was waited for when nothing was to come")
        if problem is not None:
            return self.failed(RetryPushError(f"the center did not come from {self._peer}: {problem}"))
        self.received = self._fragment_count
        return self._done()

    def ended(self) -> Decide:
        """The server's stream has ended."""
        if self.is_over:
            return self._broken("was heard after the end")
        return self._broken("ended a push without an outcome; is it a parameter server?")

    def failed(self, error: ModelAverageError) -> Decide:
        """The call or the transport failed. Ignored after the end of the push."""
        if not self.is_over:
            self.state = State.FAILED
        return PushFailed(error)

    def _done(self) -> Decide:
        assert self._outcome is not None
        self.state = State.DONE
        return Done(self._outcome, self._outcome is Outcome.COMMITTED)

    def _broken(self, what: str) -> Decide:
        return self.failed(ProtocolError(f"{self._peer} {what}"))


def retry_after(error: ModelAverageError) -> Retry:
    """Whether a push that failed with this error may be made again."""
    if isinstance(error, RetryPushError):
        return Retry.AT_ONCE
    waits = (Reason.STREAM_STALLED, Reason.WORKER_ID_IN_USE)
    return Retry.LATER if isinstance(error, ServerUnavailableError) or error.reason in waits else Retry.NO
