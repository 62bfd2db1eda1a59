"""The table of faults: what goes over the wire for each reason, and what a client makes of it."""

from __future__ import annotations

import threading

import pytest

from ma_client.job.patience import Patience
from modelaverage.errors import (
    ACTION_METADATA_KEY,
    FAULTS,
    REASON_METADATA_KEY,
    REASON_PREFIX,
    Action,
    ConflictError,
    ModelAverageError,
    Reason,
    RetryPushError,
    ServerUnavailableError,
    fault_told,
    refusal,
    refusal_metadata,
    told_reason,
)
from modelaverage.runtime.deadline import Deadline

UNKNOWN = REASON_METADATA_KEY, REASON_PREFIX + "OF_THE_FUTURE"


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_goes_over_the_wire_with_its_action(reason: Reason) -> None:
    assert dict(refusal_metadata(reason)) == {
        "modelaverage-reason": "ERROR_REASON_" + reason.name,
        "modelaverage-action": FAULTS[reason].action.value,
    }
    assert told_reason(refusal_metadata(reason)) == reason.name


@pytest.mark.parametrize("reason", Reason)
def test_a_known_reason_comes_back_as_its_exception_whatever_the_action_says(reason: Reason) -> None:
    for action in (*(action.value for action in Action), "of-the-future"):
        metadata = dict(refusal_metadata(reason)) | {ACTION_METADATA_KEY: action}
        error = fault_told(metadata.items(), "what happened", FAULTS[reason].status)
        assert (type(error), error and error.reason) == (FAULTS[reason].exception, reason)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("again", ServerUnavailableError),
        ("later", ServerUnavailableError),
        ("pull", ConflictError),
        ("stop", ModelAverageError),
        ("of-the-future", ModelAverageError),
    ],
)
@pytest.mark.parametrize("reason", [(UNKNOWN,), ()])
def test_an_unknown_reason_is_read_by_its_action(
    action: str, expected: type[ModelAverageError], reason: tuple[tuple[str, str], ...]
) -> None:
    error = fault_told((*reason, (ACTION_METADATA_KEY, action)), "what happened", "ABORTED")
    assert error is not None
    assert (type(error), error.reason, error.status, str(error)) == (expected, None, "ABORTED", "what happened")


@pytest.mark.parametrize("metadata", [None, (), (UNKNOWN,), (("other", "again"),)])
def test_a_refusal_without_an_action_of_an_unknown_reason_is_left_to_its_status(
    metadata: tuple[tuple[str, str], ...] | None,
) -> None:
    assert fault_told(metadata, "what happened", "ABORTED") is None


@pytest.mark.parametrize("reason", Reason)
def test_the_action_of_a_reason_is_what_the_python_client_does(reason: Reason) -> None:
    over = threading.Event()
    over.set()  # no pause is waited for
    attempts = 0

    def attempt() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise refusal(reason, "what happened")
        return "done"

    patience = Patience(60.0, lambda: 0.0, over)
    if FAULTS[reason].action is Action.LATER:
        assert patience.call(attempt, Deadline(None)) == "done"
    else:
        with pytest.raises(FAULTS[reason].exception):
            patience.call(attempt, Deadline(None))
    assert (FAULTS[reason].action is Action.AGAIN) == (FAULTS[reason].exception is RetryPushError)
