"""The outer optimizer that a session names, and the one that its servers have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from modelaverage.errors import ConflictError, InvalidRequestError, Reason
from modelaverage.outer import AVERAGE, OuterOptimizer, outer_optimizer, text_of

__all__ = ["check_has", "check_same", "in_force", "named", "with_address"]


def named(outer: OuterOptimizer | str | None) -> str:
    """The text to send for what a user named; empty for None: the user names none.

    Raises:
        InvalidRequestError: OUTER_OPTIMIZER_INVALID: the text names none that this version knows, a setting is wrong,
            or the text is too long.
        TypeError: it is neither an outer optimizer nor text.
    """
    if outer is None:
        return ""
    if not isinstance(outer, OuterOptimizer | str):
        raise TypeError(
            f"outer_optimizer is {outer!r:.80}; give an outer optimizer such as OuterSGD(lr=0.7, momentum=0.9, "
            "nesterov=True), its text, or None"
        )
    try:
        return text_of(outer_optimizer(outer) if isinstance(outer, str) else outer)
    except ValueError as error:
        raise InvalidRequestError(str(error), Reason.OUTER_OPTIMIZER_INVALID) from None


def in_force(told: str) -> str:
    """The text of the outer optimizer that a server told; servers leave it empty for `average`."""
    return told or text_of(AVERAGE)


def check_has(wanted: str, told: str, address: str) -> None:
    """Checks that a server has the outer optimizer that this session names, if it names one.

    Raises:
        ConflictError: OUTER_OPTIMIZER_MISMATCH: it has another one. Servers of versions without outer optimizers have
            `average` whatever the chief asks for.
    """
    if wanted and wanted != in_force(told):
        instead = "" if told else "; a server that was asked for it and has average must be updated"
        raise ConflictError(
            f"the center at {address} has the outer optimizer {in_force(told)}, and this worker names {wanted}; give "
            f"all workers the same one, or none{instead}",
            Reason.OUTER_OPTIMIZER_MISMATCH,
        )


def check_same(told: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ConflictError (OUTER_OPTIMIZER_MISMATCH) unless all servers told the same outer optimizer."""
    for each, address in zip(told, addresses, strict=True):
        if each != told[0]:
            raise ConflictError(
                f"the parameter server at {address} has the outer optimizer {in_force(each)}, that at {addresses[0]} "
                f"has {in_force(told[0])}; they are not of one job",
                Reason.OUTER_OPTIMIZER_MISMATCH,
            )


@contextmanager
def with_address(address: str) -> Iterator[None]:
    """A context in which the error of a server that refuses an outer optimizer gets the server's address."""
    try:
        yield
    except ConflictError as error:
        if error.reason is not Reason.OUTER_OPTIMIZER_MISMATCH or address in str(error):
            raise
        raise ConflictError(f"the parameter server at {address}: {error}", error.reason, error.status) from None
