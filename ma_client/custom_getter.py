"""Which tensors of a model are center variables, and what they are called. After the original's custom getter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from modelaverage.manifest import DTYPES

__all__ = ["GLOBAL_VARIABLE_NAME", "ModelAverageCustomGetter"]

GLOBAL_VARIABLE_NAME = "global_center_variable"
"""The scope of center variables in the original: local ``w`` averages into ``global_center_variable/w``."""


class ModelAverageCustomGetter:
    """Moves a model to the worker's device and knows its center variables.

    Center variables are the parameters that are trained (``requires_grad``), tied ones once, and, unless
    ``average_buffers`` is False, the floating-point buffers that are part of the state dict (BatchNorm's statistics).
    Integer buffers stay local.

    Source: ``ModelAverageCustomGetter`` of TensorFlow 1.15, which is a variable getter there: it had trainable
    variables only, which ``average_buffers=False`` gives exactly.

    Args:
        worker_device: where the model computes: "cpu", "cuda:0", a torch.device.
        average_buffers: whether buffers are center variables, too.

    Example:
        >>> getter = ModelAverageCustomGetter(worker_device="cpu")
        >>> model = getter(Net())
    """

    def __init__(self, worker_device: torch.device | str, average_buffers: bool = True) -> None:
        self.worker_device = torch.device(worker_device)
        self.average_buffers = average_buffers
        self._model: torch.nn.Module | None = None

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves ``model`` to the worker's device and returns it.

        Raises:
            ValueError: this getter has a model already; or a variable has an element type that cannot be averaged.
        """
        if self._model is not None:
            raise ValueError("this ModelAverageCustomGetter has a model already; make one getter for each model")
        for name, tensor in self._select(model):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise ValueError(f"variable {name!r} has dtype {dtype}; only {', '.join(DTYPES)} can be averaged")
        self._model = model.to(self.worker_device)
        return self._model

    @property
    def model(self) -> torch.nn.Module:
        """The model. Raises ValueError before there is one."""
        if self._model is None:
            raise ValueError("ma_custom_getter has no model yet: call it, `model = getter(Net())`")
        return self._model

    def variables(self) -> dict[str, torch.Tensor]:
        """The local variables that are averaged, by name, in the model's order."""
        return dict(self._select(self.model))

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The parameters and buffers of these names as the model has them now: a module may assign a buffer anew."""
        found = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: found[name] for name in names}

    @property
    def local_to_center(self) -> dict[str, str]:
        """The original's name of the center variable for each local one."""
        return {name: f"{GLOBAL_VARIABLE_NAME}/{name}" for name in self.variables()}

    def _select(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        if self.average_buffers:
            kept = model.state_dict().keys()
            yield from ((n, buffer) for n, buffer in model.named_buffers() if buffer.is_floating_point() and n in kept)
