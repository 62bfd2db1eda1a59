"""GradScaler and the local optimizer: an update whose gradients are infinite is skipped, and its step counts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["has_finite_gradients", "lent_scaling", "scales_itself"]

# What GradScaler sets on an optimizer for the time of its `step`.
_SCALING = ("grad_scale", "found_inf")


def scales_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer unscales gradients and skips updates by itself, told by these two attributes. (One that
    asks for the whole scaler cannot be given it.)"""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and "grad_scaler" not in inspect.signature(optimizer.step).parameters


@contextmanager
def lent_scaling(told: torch.optim.Optimizer, local: torch.optim.Optimizer) -> Iterator[None]:
    """What GradScaler has set on one optimizer is set on the other for this time."""
    set_here = {name: told.__dict__[name] for name in _SCALING if name in told.__dict__}
    before = {name: local.__dict__[name] for name in set_here if name in local.__dict__}
    local.__dict__.update(set_here)
    try:
        yield
    finally:
        for name in set_here:
            local.__dict__.pop(name, None)
        local.__dict__.update(before)


def has_finite_gradients(told: torch.optim.Optimizer) -> bool:
    """Whether an update may be made with the gradients; they are unscaled, as GradScaler would have done it, if it left
    that to ``told``. Without GradScaler: True, and nothing is changed.

    Raises:
        ValueError: a gradient is float16, which GradScaler does not unscale.
    """
    found_inf: torch.Tensor | None = told.__dict__.get("found_inf")
    if found_inf is None:
        return True
    scale: torch.Tensor | None = told.__dict__.get("grad_scale")
    if scale is not None:
        # The arithmetic is GradScaler's own, so that the bits are. Its method needs nothing of a scaler's state.
        scaler: Any = torch.amp.GradScaler("cpu", enabled=False)
        inverse = scale.double().reciprocal().float()
        scaler._unscale_grads_(told, inverse, torch.zeros_like(inverse), False)
    return not found_inf.item()
