"""GradScaler and the local optimizer: an update with infinite gradients is skipped, but counts as a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["step_if_finite"]

# The attributes that GradScaler sets on an optimizer during its `step`.
_SCALING = ("grad_scale", "found_inf")


def step_if_finite(
    told: torch.optim.Optimizer, local: torch.optim.Optimizer, closure: Callable[[], float] | None
) -> tuple[float | None, bool]:
    """One step of the local optimizer, unless ``GradScaler`` found infinite gradients.

    Args:
        told: the optimizer that ``GradScaler`` was given.
        local: the local optimizer, with the same parameters.
        closure: for the local optimizer's ``step``.

    Returns:
        What the closure returned, and whether the step was made. (A local optimizer that scales by itself may still
        skip its update; that counts as made.)

    Raises:
        ValueError: a gradient is float16, which GradScaler does not unscale.
    """
    if _scales_itself(local):
        with _lent_scaling(told, local):
            return local.step(closure), True
    if not _has_finite_gradients(told):
        return None, False
    return local.step(closure), True


def _scales_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer unscales gradients and skips updates by itself, as GradScaler's two attributes tell it. An
    optimizer whose `step` wants the scaler as an argument does not count: there is no scaler here."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and "grad_scaler" not in inspect.signature(optimizer.step).parameters


@contextmanager
def _lent_scaling(told: torch.optim.Optimizer, local: torch.optim.Optimizer) -> Iterator[None]:
    """Sets GradScaler's attributes of one optimizer on the other during this context."""
    set_here = {name: told.__dict__[name] for name in _SCALING if name in told.__dict__}
    before = {name: local.__dict__[name] for name in set_here if name in local.__dict__}
    local.__dict__.update(set_here)
    try:
        yield
    finally:
        for name in set_here:
            local.__dict__.pop(name, None)
        local.__dict__.update(before)


def _has_finite_gradients(told: torch.optim.Optimizer) -> bool:
    """Whether the gradients allow an update. If GradScaler left unscaling to ``told``, they are unscaled as GradScaler
    would have done. Without GradScaler: True, and nothing is changed.

    Raises:
        ValueError: a gradient is float16, which GradScaler does not unscale.
    """
    found_inf: torch.Tensor | None = told.__dict__.get("found_inf")
    if found_inf is None:
        return True
    scale: torch.Tensor | None = told.__dict__.get("grad_scale")
    if scale is not None:
        # Calls GradScaler's own method, for identical bits. The method uses no state of a scaler.
        scaler: Any = torch.amp.GradScaler("cpu", enabled=False)
        inverse = scale.double().reciprocal().float()
        scaler._unscale_grads_(told, inverse, torch.zeros_like(inverse), False)
    return not found_inf.item()
