"""The rules of one push at the client, over random and hostile orders of events, against an oracle that keeps lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client.transports.push import (
    AwaitRest,
    ClientPush,
    Decide,
    Done,
    Keep,
    PushFailed,
    Retry,
    Send,
    State,
    retry_after,
)
from modelaverage.errors import (
    ModelAverageError,
    ProtocolError,
    Reason,
    RetryPushError,
    ServerUnavailableError,
    refusal,
)
from modelaverage.outcome import Outcome

COUNT = 4
PEER = "ps:2222"


@dataclass(frozen=True)
class Admitted:
    first: int


@dataclass(frozen=True)
class Came:
    first: int
    count: int


@dataclass(frozen=True)
class Told:
    outcome: int


@dataclass(frozen=True)
class RestEnded:
    problem: str | None


@dataclass(frozen=True)
class Ended:
    pass


@dataclass(frozen=True)
class Broke:
    error: ModelAverageError


Event = Admitted | Came | Told | RestEnded | Ended | Broke

EVENTS = st.one_of(
    st.builds(Admitted, st.integers(0, COUNT + 1)),
    st.builds(Came, st.integers(0, COUNT + 1), st.integers(0, COUNT + 1)),
    st.builds(Told, st.integers(0, 5)),
    st.builds(RestEnded, st.sampled_from([None, "it broke"])),
    st.just(Ended()),
    st.builds(Broke, st.sampled_from([ServerUnavailableError("gone"), refusal(Reason.ROUND_RESTARTED, "again")])),
)


@st.composite
def honest(draw: st.DrawFn, beside: bool) -> list[Event]:
    """The events of a server that keeps to the protocol."""
    events: list[Event] = [Admitted(draw(st.integers(0, COUNT)))]
    outcome = draw(st.sampled_from(list(Outcome)))
    at = COUNT if beside and outcome is Outcome.COMMITTED else 0
    while at < COUNT:
        count = draw(st.integers(1, COUNT - at))
        events.append(Came(at, count))
        at += count
    events.append(Told(outcome.value))
    if beside and outcome is Outcome.COMMITTED:
        events.append(RestEnded(draw(st.sampled_from([None, "it broke"]))))
    return events


@st.composite
def hostile(draw: st.DrawFn, beside: bool) -> list[Event]:
    """The same events with some left out, added or exchanged."""
    events = draw(honest(beside))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(events)))
        match draw(st.sampled_from(["in", "out", "exchange"])):
            case "in":
                events.insert(at, draw(EVENTS))
            case "out" if at < len(events):
                del events[at]
            case "exchange" if at + 1 < len(events):
                events[at], events[at + 1] = events[at + 1], events[at]
    return events


@dataclass
class Oracle:
    """The oracle: it remembers every event, and evaluates all of them again after each."""

    beside: bool
    heard: list[Event] = field(default_factory=list)

    @property
    def fragments(self) -> list[int]:
        """All fragments that have come, in order."""
        return [
            index
            for event in self.heard
            if isinstance(event, Came)
            for index in range(event.first, event.first + event.count)
        ]

    def verdict(self, event: Event) -> str:
        """How the push stands after this event: "goes on", "done", "protocol", "again" or "fault"."""
        self.heard.append(event)
        is_first = len(self.heard) == 1
        told = [one for one in self.heard if isinstance(one, Told)]
        if isinstance(event, Broke):
            return "fault"
        if isinstance(event, Admitted) != is_first or isinstance(event, Ended):
            return "protocol"
        if isinstance(event, Admitted):
            return "goes on" if event.first <= COUNT else "protocol"
        if isinstance(event, Came):
            in_order = self.fragments == list(range(len(self.fragments))) and len(self.fragments) <= COUNT
            return "goes on" if in_order and event.count > 0 and not told else "protocol"
        if isinstance(event, RestEnded):
            return ("done" if event.problem is None else "again") if len(told) == 1 else "protocol"
        if event.outcome not in (1, 2, 3) or len(told) > 1:
            return "protocol"
        if len(self.fragments) == COUNT:
            return "done"
        if not self.beside:
            return "protocol"
        return "goes on" if event.outcome == Outcome.COMMITTED.value else "again"


def tell(push: ClientPush, event: Event) -> Decide:
    match event:
        case Admitted(first):
            return push.admitted(first)
        case Came(first, count):
            return push.came(first, count)
        case Told(outcome):
            return push.told(outcome)
        case RestEnded(problem):
            return push.rest_ended(problem)
        case Ended():
            return push.ended()
        case Broke(error):
            return push.failed(error)


def meant_by(decided: Decide) -> str:
    match decided:
        case Done():
            return "done"
        case PushFailed(ProtocolError()):
            return "protocol"
        case PushFailed(RetryPushError(reason=None)):
            return "again"
        case PushFailed():
            return "fault"
        case _:
            return "goes on"


@given(st.booleans().flatmap(lambda beside: st.tuples(st.just(beside), hostile(beside))))
def test_a_push_is_done_exactly_when_a_whole_center_came_in_order(play: tuple[bool, list[Event]]) -> None:
    beside, events = play
    push, oracle = ClientPush(PEER, COUNT, beside), Oracle(beside)
    for event in events:
        decided = tell(push, event)
        verdict = oracle.verdict(event)
        assert meant_by(decided) == verdict, (oracle.heard, decided)
        assert push.is_over == (verdict != "goes on")
        if push.is_over:
            break
        if isinstance(event, Came):
            assert decided == Keep(event.first, event.count)
            assert push.received == len(oracle.fragments)


@given(st.booleans(), st.data())
def test_a_server_that_keeps_to_the_protocol_never_fails_a_push(beside: bool, data: st.DataObject) -> None:
    events = data.draw(honest(beside))
    push = ClientPush(PEER, COUNT, beside)
    *_, last = [tell(push, event) for event in events]
    if events[-1] == RestEnded("it broke"):
        assert isinstance(last, PushFailed)
        assert last.retry is Retry.AT_ONCE
    else:
        outcome = next(event.outcome for event in events if isinstance(event, Told))
        assert last == Done(Outcome(outcome), outcome == Outcome.COMMITTED.value)


@given(st.booleans(), st.lists(EVENTS, max_size=6), st.lists(EVENTS, min_size=1, max_size=4))
def test_nothing_changes_a_push_that_is_over(beside: bool, before: list[Event], after: list[Event]) -> None:
    push = ClientPush(PEER, COUNT, beside)
    for event in [*before, Ended()]:
        tell(push, event)
    state, received = push.state, push.received
    assert push.is_over
    for event in after:
        assert isinstance(tell(push, event), PushFailed)
        assert (push.state, push.received) == (state, received)


def test_the_admission_says_from_where_on_to_send() -> None:
    push = ClientPush(PEER, COUNT)
    assert push.state is State.OPENED
    assert push.admitted(2) == Send(2)
    assert State.ADMITTED in (push.state,)


def test_bytes_beside_the_call_are_waited_for_after_the_outcome() -> None:
    push = ClientPush(PEER, COUNT, beside=True)
    push.admitted(0)
    assert push.told(Outcome.COMMITTED.value) == AwaitRest()
    assert push.state is State.CLOSING
    assert push.rest_ended(None) == Done(Outcome.COMMITTED, True)


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (refusal(Reason.ROUND_RESTARTED, ""), Retry.AT_ONCE),
        (refusal(Reason.DATA_CONNECTION_LOST, ""), Retry.AT_ONCE),
        (refusal(Reason.SERVER_STOPPING, ""), Retry.LATER),
        (refusal(Reason.STREAM_STALLED, ""), Retry.LATER),
        (refusal(Reason.WORKER_ID_IN_USE, ""), Retry.LATER),
        (ServerUnavailableError(""), Retry.LATER),
        (refusal(Reason.BASE_STEP_AHEAD, ""), Retry.NO),
        (ProtocolError(""), Retry.NO),
    ],
)
def test_what_broke_says_whether_the_same_push_may_be_made_again(error: ModelAverageError, retry: Retry) -> None:
    assert retry_after(error) is retry
    assert PushFailed(error).retry is retry
