"""The outer optimizer that a call names, and whether it is the center's."""

from __future__ import annotations

from modelaverage.errors import Reason, refusal
from modelaverage.outer import OuterOptimizer, outer_optimizer, text_of

__all__ = ["check_named", "outer_named"]


def outer_named(text: str) -> OuterOptimizer | None:
    """The outer optimizer that a header names; None if it names none.

    Raises:
        InvalidRequestError: OUTER_OPTIMIZER_INVALID: this version does not know it, or a setting is wrong.
    """
    if not text:
        return None
    try:
        return outer_optimizer(text)
    except ValueError as error:
        raise refusal(Reason.OUTER_OPTIMIZER_INVALID, str(error)) from None


def check_named(named: OuterOptimizer | None, in_force: OuterOptimizer) -> None:
    """Raises ConflictError (OUTER_OPTIMIZER_MISMATCH) if a call names another outer optimizer than the center's."""
    if named is not None and named != in_force:
        raise refusal(
            Reason.OUTER_OPTIMIZER_MISMATCH,
            f"the center has the outer optimizer {text_of(in_force)}, and this call names {text_of(named)}; give all "
            "workers the same one, or none",
        )
