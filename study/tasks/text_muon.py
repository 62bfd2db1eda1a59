"""The bytes of `study.tasks.text`, with Muon for the matrices of the transformer.

Momentum, weight decay and rates are those of Muon as it is scaled to large models (Liu et al., arXiv:2502.16982): the
update of a matrix has the root mean square of AdamW's, so both share one learning rate. MuLoCo (arXiv:2505.23725) found
that workers with long intervals lose less with Muon than with AdamW.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from study.tasks.muon import Muon
from study.tasks.text import TextTask

__all__ = ["MuonTextTask", "MuonWithAdamW"]

_WEIGHT_DECAY = 0.1
_LARGEST_NORM = 1.0


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: Muon for the linear layers' weights, AdamW for embeddings, biases and norms.

    They share groups and state with this one, so learning rates are set and moments are found as ever. Before a step,
    the gradient is clipped to a norm of 1: a worker's small batches now and then have one that would fill the momentum
    of Muon for a long time.

    Args:
        model: every matrix within a linear layer is Muon's.
        learning_rate: of both.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
        taken = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        muon = Muon(matrices, lr=learning_rate, weight_decay=_WEIGHT_DECAY, momentum=0.95)
        adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY, fused=True)
        self._both = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.param_groups[:] = [group for each in self._both for group in each.param_groups]
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips, and makes a step of both. ``closure`` must be None."""
        assert closure is None
        nn.utils.clip_grad_norm_([each for group in self.param_groups for each in group["params"]], _LARGEST_NORM)
        for each in self._both:
            each.step()


class MuonTextTask(TextTask):
    """Like the other text task, but Muon and AdamW with clipping, and a larger sample of the text that is held out."""

    name: ClassVar[str] = "text-muon"
    held_out_sequences: ClassVar[int] = 1024

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Muon with AdamW."""
        return MuonWithAdamW(model, learning_rate)
