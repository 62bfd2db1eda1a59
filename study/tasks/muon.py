"""Muon as torch has it, fast on processors that cannot multiply bfloat16.

`torch.optim.Muon` orthogonalizes in bfloat16, which takes 20 times as long as float32 where the processor has no
instructions for it. Here numbers are bfloat16 between the products, too, but the products are computed in float32:
the same method with the same roundings, on every processor. Matrices of one shape are multiplied together.

The method is Jordan's (https://kellerjordan.github.io/posts/muon/), with the rate scaled as by Liu et al.
(arXiv:2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of the quintic that pulls singular values towards 1."""
_ITERATIONS = 5
_LEAST_NORM = 1e-7
_UPDATE_RMS = 0.2
"""Of an update, as AdamW's usually has it."""


def orthogonalized(matrices: Tensor) -> Tensor:
    """Of each matrix U S V', about U V': singular values between 0.5 and 1.5. [N, rows, columns], float32."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    current = matrices.bfloat16()
    if is_tall:
        current = current.transpose(1, 2)
    norms: Tensor = torch.linalg.vector_norm(current, dim=(1, 2), keepdim=True)
    wide = (current / norms.clamp(min=_LEAST_NORM)).float()
    for _ in range(_ITERATIONS):
        gram = _rounded(wide @ wide.transpose(1, 2))
        factor = _rounded(torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C))
        wide = _rounded(torch.baddbmm(wide, factor, wide, beta=_A))
    return wide.transpose(1, 2) if is_tall else wide


class Muon(torch.optim.Optimizer):
    """Like `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``.

    Args:
        parameters: float32 matrices.
        lr: the learning rate.
        weight_decay: per step, times the learning rate.
        momentum: of the gradients' average, with Nesterov's look ahead.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient. ``closure`` must be None."""
        assert closure is None
        for group in self.param_groups:
            by_shape = dict[torch.Size, list[Tensor]]()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                looks_ahead = [self._momentum(each, group["momentum"]) for each in parameters]
                updates = orthogonalized(torch.stack(looks_ahead))
                rate = group["lr"] * _UPDATE_RMS * math.sqrt(max(rows, columns))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def _rounded(values: Tensor) -> Tensor:
    return values.bfloat16().float()
