"""How long a session retries, and what it logs. Time is simulated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from ma_client.job.patience import Patience
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    ModelAverageError,
    Reason,
    ServerUnavailableError,
    refusal,
)
from modelaverage.runtime.deadline import Deadline
from modelaverage.runtime.tuning import GONE_AFTER_S

FOREVER = Deadline(None)


class Clock:
    """Time that passes only in sleeps and calls."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleeps: list[float] = []

    def sleep(self, sleep_s: float) -> None:
        self.sleeps.append(sleep_s)
        self.now_s += sleep_s

    def patience(self, timeout_s: float, answered_at_s: Callable[[], float], **options: Any) -> Patience:
        return Patience(timeout_s, answered_at_s, clock=lambda: self.now_s, pause=self.sleep, **options)

    def deadline(self, timeout_s: float) -> Deadline:
        return Deadline(timeout_s, lambda: self.now_s)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def failing(*errors: ModelAverageError) -> Callable[[], str]:
    """Raises these errors, one in each call, the last one forever; None ends them."""
    left = list(errors)

    def call() -> str:
        if not left:
            return "done"
        raise left.pop(0)

    return call


def away(count: int) -> list[ModelAverageError]:
    return [ServerUnavailableError("the server is gone") for _ in range(count)]


def test_what_succeeds_is_not_called_again(clock: Clock) -> None:
    assert clock.patience(60, lambda: 0.0).call(failing(), FOREVER) == "done"
    assert clock.sleeps == []


def test_a_server_that_comes_back_in_time_costs_only_the_wait(clock: Clock) -> None:
    assert clock.patience(60, lambda: 0.0).call(failing(*away(20)), FOREVER) == "done"
    assert len(clock.sleeps) == 20
    assert max(clock.sleeps) <= 1.0


def test_sleeps_grow_and_are_never_the_same_for_two_workers(clock: Clock) -> None:
    for _ in range(2):
        clock.patience(60, lambda: 0.0).call(failing(*away(5)), FOREVER)
    first, second = clock.sleeps[:5], clock.sleeps[5:]
    assert all(0.5 * 0.05 * 2**n <= sleep_s <= 0.05 * 2**n for n, sleep_s in enumerate(first))
    assert first != second


def test_a_server_that_stays_away_is_given_up_in_time_with_the_reason(clock: Clock) -> None:
    began_at_s = clock.now_s
    with pytest.raises(ServerUnavailableError, match=r"the server is gone \(tried again for 60 s\)"):
        clock.patience(60, lambda: 0.0).call(failing(*away(10_000)), FOREVER)
    assert 60 <= clock.now_s - began_at_s <= 61


def test_a_server_that_answered_in_between_is_waited_for_afresh(clock: Clock) -> None:
    answered_at_s = [0.0]

    def call() -> str:
        clock.now_s += 50  # at the barrier, say
        answered_at_s[0] = clock.now_s
        if clock.now_s < 2000:
            raise ServerUnavailableError("the server is gone")
        return "done"

    assert clock.patience(60, lambda: answered_at_s[0]).call(call, FOREVER) == "done"


def test_a_server_that_is_away_until_the_deadline_is_named(clock: Clock) -> None:
    began_at_s = clock.now_s
    with pytest.raises(DeadlineExceededError, match=r"the server is gone \(waited 2 s\)"):
        clock.patience(60, lambda: 0.0).call(failing(*away(1000)), clock.deadline(2.0))
    assert 2.0 <= clock.now_s - began_at_s < 2.1


@pytest.mark.parametrize("reason", [Reason.MANIFEST_MISMATCH, Reason.ROUND_FULL, Reason.BASE_STEP_AHEAD])
def test_what_trying_again_does_not_help_is_raised_at_once(clock: Clock, reason: Reason) -> None:
    with pytest.raises(ModelAverageError) as raised:
        clock.patience(60, lambda: 0.0).call(failing(refusal(reason, "no")), FOREVER)
    assert (raised.value.reason, clock.sleeps) == (reason, [])


def test_without_patience_the_first_failure_counts(clock: Clock) -> None:
    with pytest.raises(ServerUnavailableError, match=r"gone$"):
        clock.patience(0, lambda: 0.0).call(failing(*away(1)), FOREVER)
    assert clock.sleeps == []


def test_an_id_in_use_is_tried_again_as_long_as_the_server_needs_to_notice_a_dead_process(clock: Clock) -> None:
    began_at_s, taken = clock.now_s, refusal(Reason.WORKER_ID_IN_USE, "'a' is in use")
    assert clock.patience(60, lambda: clock.now_s).call(failing(*[taken] * 12), FOREVER) == "done"
    with pytest.raises(ModelAverageError, match="in use"):
        clock.patience(60, lambda: clock.now_s).call(failing(*[taken] * 1000), FOREVER)
    assert clock.now_s - began_at_s < 80


def test_an_id_is_given_up_only_after_the_server_has_noticed_that_its_process_is_gone(clock: Clock) -> None:
    taken = refusal(Reason.WORKER_ID_IN_USE, "'a' is in use")
    with pytest.raises(ConflictError):
        clock.patience(600, lambda: clock.now_s).call(failing(*[taken] * 1000), FOREVER)
    assert GONE_AFTER_S < sum(clock.sleeps) < GONE_AFTER_S + 10


@pytest.mark.parametrize("reason", [None, Reason.STREAM_STALLED])
def test_a_model_that_moves_is_waited_for_however_often_its_call_breaks(clock: Clock, reason: Reason | None) -> None:
    progressed_at_s = [0.0]

    def call() -> str:
        clock.now_s += 50  # some fragments came
        progressed_at_s[0] = clock.now_s
        clock.now_s += 50  # then none
        if clock.now_s < 2000:
            raise ServerUnavailableError("the server is gone") if reason is None else refusal(reason, "nothing moved")
        return "done"

    patience = clock.patience(60, lambda: 0.0, progressed_at_s=lambda: progressed_at_s[0])
    assert patience.call(call, FOREVER) == "done"
    with pytest.raises(ModelAverageError):
        clock.patience(60, lambda: 0.0).call(failing(*away(10_000)), FOREVER)


def test_another_trouble_is_given_its_own_time(clock: Clock) -> None:
    taken = refusal(Reason.WORKER_ID_IN_USE, "'a' is in use")
    assert clock.patience(60, lambda: 0.0).call(failing(*away(40), taken, taken), FOREVER) == "done"
    assert sum(clock.sleeps) > 20  # longer than an id in use is tried again


def test_an_id_in_use_is_named_rather_than_the_deadline_that_it_leads_to(clock: Clock) -> None:
    taken = refusal(Reason.WORKER_ID_IN_USE, "'a' is in use")
    with pytest.raises(ConflictError, match="in use"):
        clock.patience(60, lambda: 0.0).call(failing(*[taken] * 1000), clock.deadline(0.3))
    assert sum(clock.sleeps) < 0.3


def test_a_server_that_stays_away_is_named_again_and_again(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerUnavailableError):
        clock.patience(60, lambda: 0.0).call(failing(*away(10_000)), FOREVER)
    first, *later = caplog.messages
    assert first == "the server is gone; trying again for up to 60 s"
    tried_s = [
        int(re.findall(r"the server is gone; tried for (\d+) s, trying for up to \d+ more", words)[0])
        for words in later
    ]
    # Sleeps of up to a second are in between.
    assert all(0 <= at_s - due_s <= 1 for at_s, due_s in zip(tried_s, (5, 15, 35), strict=True))
    caplog.clear()
    assert clock.patience(60, lambda: 0.0).call(failing(*away(5)), FOREVER) == "done"
    assert caplog.messages == [first]
