"""A tensor of the caller's that shows `global_step`, as TensorFlow's ``global_step`` variable does."""

from __future__ import annotations

import torch

__all__ = ["ShownGlobalStep"]


class ShownGlobalStep:
    """The ``global_step`` tensor of a caller, which shows the rounds completed.

    Attributes:
        tensor: an integer tensor; None: there is none.
    """

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None

    def show(self, global_step: int) -> None:
        """Sets the tensor, if there is one."""
        if self.tensor is not None:
            self.tensor.fill_(global_step)
