"""What a session names of the job's choices, and what its servers have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from modelaverage.chosen import CHOICES, Chosen, codec_of
from modelaverage.errors import ConflictError, InvalidRequestError, Reason
from modelaverage.outer import OuterOptimizer, text_of

__all__ = ["check_has", "check_same", "named", "with_address"]

_MISMATCHES = tuple(choice.mismatch for choice in CHOICES)


def named(outer: OuterOptimizer | str | None, compression: str | None = None) -> Chosen:
    """What to send for what a user named; empty for None: the user names none.

    Raises:
        InvalidRequestError: OUTER_OPTIMIZER_INVALID: the text names none that this version knows, a setting is wrong,
            or the text is too long; CODEC_UNKNOWN.
        TypeError: ``outer`` is neither an outer optimizer nor text, or ``compression`` is no text.
    """
    if not isinstance(outer, OuterOptimizer | str | None):
        raise TypeError(
            f"outer_optimizer is {outer!r:.80}; give an outer optimizer such as OuterSGD(lr=0.7, momentum=0.9, "
            "nesterov=True), its text, or None"
        )
    if not isinstance(compression, str | None):
        raise TypeError(f'compression is {compression!r:.80}; give a text such as "int8", or None')
    try:
        codec = codec_of(compression) if compression else ""
    except ValueError as error:
        raise InvalidRequestError(str(error), Reason.CODEC_UNKNOWN) from None
    try:
        return Chosen(text_of(outer) if isinstance(outer, OuterOptimizer) else outer or "", codec).normal
    except ValueError as error:
        raise InvalidRequestError(str(error), Reason.OUTER_OPTIMIZER_INVALID) from None


def check_has(wanted: Chosen, told: Chosen, address: str) -> None:
    """Checks that a server has what this session names.

    Raises:
        ConflictError: OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH: it has another one. Servers of versions that do
            not know the choice have the default whatever the chief asks for.
    """
    for choice, ours, theirs in wanted.differences(told):
        instead = (
            f"; a server that was asked for it and has {choice.default_shown} must be updated"
            if theirs == choice.default_shown
            else ""
        )
        raise ConflictError(
            f"the center at {address} has the {choice.noun} {theirs}, and this worker names {ours}; give all workers "
            f"the same one, or leave it out{instead}",
            choice.mismatch,
        )


def check_same(told: Sequence[Chosen], addresses: Sequence[str]) -> None:
    """Raises ConflictError (OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH) unless all servers told the same."""
    for each, address in zip(told, addresses, strict=True):
        for choice, first, other in told[0].in_force.differences(each):
            raise ConflictError(
                f"the parameter server at {address} has the {choice.noun} {other}, that at {addresses[0]} has "
                f"{first}; they are not of one job",
                choice.mismatch,
            )


@contextmanager
def with_address(address: str) -> Iterator[None]:
    """A context in which the error of a server that refuses a choice gets the server's address."""
    try:
        yield
    except ConflictError as error:
        if error.reason not in _MISMATCHES or address in str(error):
            raise
        raise ConflictError(f"the parameter server at {address}: {error}", error.reason, error.status) from None
