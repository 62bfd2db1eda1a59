"""Rules for single values: the server checks whatever was sent, the client most of it before it sends."""

from __future__ import annotations

import math
from numbers import Real

from modelaverage.errors import InvalidRequestError, Reason, refusal

__all__ = [
    "INCARNATION_BYTES",
    "MAX_TIMEOUT_S",
    "MAX_WEIGHT",
    "MAX_WORKER_ID_BYTES",
    "MIN_WEIGHT",
    "STEP_LIMIT",
    "check_base_step",
    "check_global_step",
    "check_incarnation",
    "check_timeout",
    "check_weight",
    "check_worker_id",
]

MAX_WORKER_ID_BYTES = 128
INCARNATION_BYTES = 16
# Weights multiply values in the variables' own precision. Within these bounds, no weight turns a value into 0 or
# infinity that was not near it before.
MIN_WEIGHT = 1e-9
MAX_WEIGHT = 1e9
# Steps fit a signed 64-bit integer, the largest type that every client language has.
STEP_LIMIT = 2**63
# gRPC takes the end of a much longer time for one that has passed.
MAX_TIMEOUT_S = 1e9


def check_worker_id(worker_id: str) -> None:
    """Raises WORKER_ID_INVALID unless the id has 1 to 128 bytes."""
    size_bytes = len(worker_id.encode("utf-8", "surrogatepass"))
    if not 1 <= size_bytes <= MAX_WORKER_ID_BYTES:
        shown = f"{worker_id[:20]!r}..." if size_bytes > MAX_WORKER_ID_BYTES else repr(worker_id)
        raise refusal(
            Reason.WORKER_ID_INVALID,
            f"worker id {shown} has {size_bytes} bytes; give 1 to {MAX_WORKER_ID_BYTES}",
        )


def check_incarnation(incarnation: bytes) -> None:
    """Raises INCARNATION_INVALID unless it has 16 bytes."""
    if len(incarnation) != INCARNATION_BYTES:
        raise refusal(
            Reason.INCARNATION_INVALID,
            f"incarnation has {len(incarnation)} bytes; it has to have {INCARNATION_BYTES} random ones",
        )


def check_weight(weight: float) -> None:
    """Raises WEIGHT_INVALID unless the weight is a number from 1e-9 to 1e9."""
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # also refuses NaN
        raise refusal(
            Reason.WEIGHT_INVALID,
            f"weight {weight:g} is not usable; give a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}",
        )


def check_base_step(base_step: int) -> None:
    """Raises GLOBAL_STEP_INVALID unless the step is from 0 to 2**63 - 2: a round increases it by one."""
    if not 0 <= base_step < STEP_LIMIT - 1:
        raise refusal(Reason.GLOBAL_STEP_INVALID, f"base step {base_step} is not from 0 to 2**63 - 2")


def check_global_step(global_step: int) -> None:
    """Raises GLOBAL_STEP_INVALID unless the step is from 0 to 2**63 - 1."""
    if not 0 <= global_step < STEP_LIMIT:
        raise refusal(Reason.GLOBAL_STEP_INVALID, f"global_step {global_step} is not from 0 to 2**63 - 1")


def check_timeout(
    name: str, timeout_s: object, *, zero: str = "", none: str = "", may_be_infinite: bool = False
) -> None:
    """Raises InvalidRequestError unless ``timeout_s`` is a number of seconds above 0, or one of the other values that
    it may be.

    Args:
        name: of the argument, for the message.
        timeout_s: its value.
        zero: what 0 means; empty: it must not be 0.
        none: what None means; empty: it must not be None.
        may_be_infinite: whether it may be longer than `MAX_TIMEOUT_S`.
    """
    if timeout_s is None and none:
        return
    longest_s = math.inf if may_be_infinite else MAX_TIMEOUT_S
    if isinstance(timeout_s, Real) and (0 < float(timeout_s) <= longest_s or (zero and timeout_s == 0)):  # not NaN
        return
    bound = "" if may_be_infinite else f" up to {MAX_TIMEOUT_S:g}"
    others = "".join(f", or {value} ({meaning})" for value, meaning in (("0", zero), ("None", none)) if meaning)
    raise InvalidRequestError(f"{name} is {timeout_s!r}; give a number of seconds above 0{bound}{others}")
