"""The table of errors: reason <-> gRPC status <-> exception <-> the client's next action.

The server raises these exceptions. The service turns them into a status and into trailing metadata with the reason's
name and the action; the client turns those back into the same exception. So an error has one name and one class
everywhere. This module does not import grpc, because the pure rules raise these exceptions, too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ACTION_METADATA_KEY",
    "Action",
    "ConflictError",
    "DeadlineExceededError",
    "FAULTS",
    "Fault",
    "InvalidRequestError",
    "ModelAverageError",
    "NotInitializedError",
    "ProtocolError",
    "REASON_METADATA_KEY",
    "REASON_PREFIX",
    "Reason",
    "RetryPushError",
    "SecurityError",
    "ServerUnavailableError",
    "SessionInUseError",
    "fault_named",
    "fault_told",
    "refusal",
    "refusal_metadata",
    "told_reason",
]

REASON_METADATA_KEY = "modelaverage-reason"
ACTION_METADATA_KEY = "modelaverage-action"
REASON_PREFIX = "ERROR_REASON_"


class Reason(enum.Enum):
    """Why a call was refused. The names are those of the protocol's ``ErrorReason`` without its prefix."""

    MESSAGE_MALFORMED = 1
    MESSAGE_OUT_OF_ORDER = 2
    NOT_INITIALIZED = 3
    MANIFEST_INVALID = 4
    MANIFEST_MISMATCH = 5
    MANIFEST_UNKNOWN = 6
    GLOBAL_STEP_INVALID = 7
    WORKER_ID_INVALID = 8
    WORKER_ID_IN_USE = 9
    INCARNATION_INVALID = 10
    WEIGHT_INVALID = 11
    BASE_STEP_AHEAD = 12
    UNTOUCHED_INVALID = 13
    ROUND_FULL = 14
    ROUND_RESTARTED = 15
    PUSH_SUPERSEDED = 16
    FRAGMENT_MISSING = 17
    FRAGMENT_EXTRA = 18
    FRAGMENT_MISPLACED = 19
    FRAGMENT_REPEATED = 20
    FRAGMENT_SIZE_WRONG = 21
    STREAM_STALLED = 22
    SERVER_STOPPING = 23
    ROUND_TIMED_OUT = 24
    TOKEN_INVALID = 25
    ROLE_INSUFFICIENT = 26
    DATA_CONNECTION_LOST = 27
    SERVER_OVERLOADED = 28
    READER_TOO_SLOW = 29
    CODEC_UNKNOWN = 30
    OUTER_OPTIMIZER_INVALID = 31
    OUTER_OPTIMIZER_MISMATCH = 32
    COMPRESSION_MISMATCH = 33
    BASE_UNKNOWN = 34


class Action(enum.Enum):
    """What a client does after a refusal. The value is the word in the trailing metadata."""

    AGAIN = "again"
    """Repeat the same call at once."""
    LATER = "later"
    """Repeat the same call after a pause, for a bounded time."""
    PULL = "pull"
    """Pull the center and continue from it."""
    STOP = "stop"
    """The client cannot continue by itself."""


class ModelAverageError(Exception):
    """Base of all errors. ``reason`` is None for errors that no server reported, such as an unreachable server.
    ``status`` is the name of the gRPC status that ended the call; None if there was none."""

    def __init__(self, message: str, reason: Reason | None = None, status: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class InvalidRequestError(ModelAverageError):
    """The request breaks a rule; repeating it will not help. Nothing was changed."""


class ProtocolError(InvalidRequestError):
    """The bytes on the wire break the protocol: a fault of the client library, or of a proxy in between."""


class ConflictError(ModelAverageError):
    """The request is well formed but does not fit the job: another manifest, or another process under this id."""


class NotInitializedError(ModelAverageError):
    """There is no center yet: the chief must initialize it."""


class RetryPushError(ModelAverageError):
    """The push is not in the round, through no fault of its own; the same push may be repeated at once."""


class DeadlineExceededError(ModelAverageError):
    """The awaited event did not happen within the time limit. Local variables are untouched."""


class SecurityError(ModelAverageError):
    """Server and client do not trust each other, or a certificate or token file is unusable. Nothing was changed."""


class ServerUnavailableError(ModelAverageError):
    """No parameter server answers there, or it cannot serve the call now. Local variables are untouched."""


class SessionInUseError(ModelAverageError):
    """Two threads use one session at once. This call was not made; the call in progress is not affected."""


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        status: the name of the gRPC status that carries the reason.
        exception: the exception class.
        action: what the client does next.
    """

    status: str
    exception: type[ModelAverageError]
    action: Action = Action.STOP


_BAD_MESSAGE = Fault("INVALID_ARGUMENT", ProtocolError)
_BAD_VALUE = Fault("INVALID_ARGUMENT", InvalidRequestError)
_OTHER_CENTER = Fault("FAILED_PRECONDITION", ConflictError, Action.PULL)
_NOT_NOW = Fault("UNAVAILABLE", ServerUnavailableError, Action.LATER)

FAULTS: dict[Reason, Fault] = {
    Reason.MESSAGE_MALFORMED: _BAD_MESSAGE,
    Reason.MESSAGE_OUT_OF_ORDER: _BAD_MESSAGE,
    Reason.NOT_INITIALIZED: Fault("FAILED_PRECONDITION", NotInitializedError),
    Reason.MANIFEST_INVALID: _BAD_VALUE,
    Reason.MANIFEST_MISMATCH: Fault("FAILED_PRECONDITION", ConflictError),
    Reason.MANIFEST_UNKNOWN: _OTHER_CENTER,
    Reason.GLOBAL_STEP_INVALID: _BAD_VALUE,
    Reason.WORKER_ID_INVALID: _BAD_VALUE,
    Reason.WORKER_ID_IN_USE: Fault("ALREADY_EXISTS", ConflictError, Action.LATER),
    Reason.INCARNATION_INVALID: _BAD_VALUE,
    Reason.WEIGHT_INVALID: _BAD_VALUE,
    Reason.BASE_STEP_AHEAD: _OTHER_CENTER,
    Reason.UNTOUCHED_INVALID: _BAD_VALUE,
    Reason.ROUND_FULL: Fault("RESOURCE_EXHAUSTED", ConflictError),
    Reason.ROUND_RESTARTED: Fault("ABORTED", RetryPushError, Action.AGAIN),
    Reason.PUSH_SUPERSEDED: Fault("ABORTED", ConflictError),
    Reason.FRAGMENT_MISSING: _BAD_MESSAGE,
    Reason.FRAGMENT_EXTRA: _BAD_MESSAGE,
    Reason.FRAGMENT_MISPLACED: _BAD_MESSAGE,
    Reason.FRAGMENT_REPEATED: _BAD_MESSAGE,
    Reason.FRAGMENT_SIZE_WRONG: _BAD_MESSAGE,
    Reason.STREAM_STALLED: Fault("DEADLINE_EXCEEDED", DeadlineExceededError, Action.LATER),
    Reason.SERVER_STOPPING: _NOT_NOW,
    Reason.ROUND_TIMED_OUT: Fault("DEADLINE_EXCEEDED", DeadlineExceededError),
    Reason.TOKEN_INVALID: Fault("UNAUTHENTICATED", SecurityError),
    Reason.ROLE_INSUFFICIENT: Fault("PERMISSION_DENIED", SecurityError),
    Reason.DATA_CONNECTION_LOST: Fault("UNAVAILABLE", RetryPushError, Action.AGAIN),
    Reason.SERVER_OVERLOADED: _NOT_NOW,
    Reason.READER_TOO_SLOW: _NOT_NOW,
    Reason.CODEC_UNKNOWN: _BAD_VALUE,
    Reason.OUTER_OPTIMIZER_INVALID: _BAD_VALUE,
    Reason.OUTER_OPTIMIZER_MISMATCH: Fault("FAILED_PRECONDITION", ConflictError),
    Reason.COMPRESSION_MISMATCH: Fault("FAILED_PRECONDITION", ConflictError),
    Reason.BASE_UNKNOWN: _OTHER_CENTER,
}

_BY_ACTION: dict[str, type[ModelAverageError]] = {
    Action.AGAIN.value: ServerUnavailableError,  # after a pause, for a limited time: the reason is unknown
    Action.LATER.value: ServerUnavailableError,
    Action.PULL.value: ConflictError,
}


def refusal(reason: Reason, message: str) -> ModelAverageError:
    """The exception to raise for ``reason``, with one line that names the thing, the values and what to do."""
    return FAULTS[reason].exception(message, reason)


def refusal_metadata(reason: Reason) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of a call that is refused with ``reason``."""
    return (REASON_METADATA_KEY, REASON_PREFIX + reason.name), (ACTION_METADATA_KEY, FAULTS[reason].action.value)


def told_reason(metadata: Iterable[Any] | None) -> str:
    """The name, without its prefix, of the reason in trailing metadata, known or not; empty if there is none."""
    return str(dict(metadata or ()).get(REASON_METADATA_KEY, "")).removeprefix(REASON_PREFIX)


def fault_told(metadata: Iterable[Any] | None, message: str, status: str) -> ModelAverageError | None:
    """The exception for a call that a server refused; None if the call ended without a reason from a server.

    Args:
        metadata: the call's trailing metadata.
        message: the call's message.
        status: the name of its gRPC status.
    """
    action = dict(metadata or ()).get(ACTION_METADATA_KEY)
    return fault_named(told_reason(metadata), message, None if action is None else str(action), status)


def fault_named(
    name: str, message: str, action: str | None = None, status: str | None = None
) -> ModelAverageError | None:
    """The exception for a reason's name from the wire.

    A reason that this version does not know is handled by its action; an unknown action means `stop`. None if there is
    neither a known reason nor an action."""
    reason = Reason.__members__.get(name.removeprefix(REASON_PREFIX))
    if reason is not None:
        return refusal(reason, message)
    return None if action is None else _BY_ACTION.get(action, ModelAverageError)(message, None, status)
