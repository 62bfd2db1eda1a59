"""The parameters that the local optimizer updates, and their names in the getter's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ma_client.torch.custom_getter import ModelAverageCustomGetter

__all__ = ["LocalParameters"]


class LocalParameters:
    """The parameters in the groups of a local optimizer.

    Args:
        optimizer: the local optimizer.
        getter: has been given the model.

    Raises:
        ValueError: a parameter of the optimizer is not in the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, getter: ModelAverageCustomGetter) -> None:
        self._optimizer = optimizer
        self._getter = getter
        self.check_in_model(self.all())
        self.groups_changed()

    def all(self) -> list[torch.Tensor]:
        """Every parameter, in the order of the groups."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def groups_changed(self) -> None:
        """Reads the groups again: parameters were added or replaced."""
        names = {id(parameter): name for name, parameter in self._getter.named_parameters().items()}
        self._names = {parameter: names[id(parameter)] for parameter in self.all()}

    @property
    def names(self) -> Mapping[torch.Tensor, str]:
        """Their names in the model."""
        return self._names

    def with_gradient(self) -> set[str]:
        """Names of the parameters that have a gradient at present."""
        return {name for parameter, name in self._names.items() if parameter.grad is not None}

    def check_in_model(self, parameters: Iterable[torch.Tensor]) -> None:
        """Raises ValueError if one of them is not a parameter of the getter's model."""
        known = {id(parameter) for parameter in self._getter.model.parameters()}
        for parameter in parameters:
            if id(parameter) not in known:
                raise ValueError(
                    f"the optimizer has a parameter of shape {list(parameter.shape)} that is not in the model given to "
                    "ma_custom_getter; make the optimizer from `getter(Net()).parameters()`"
                )

    def check_known(self, variables: Iterable[object]) -> None:
        """Raises ValueError if one of them is not a parameter of the local optimizer."""
        known = {id(parameter) for parameter in self.all()}
        for variable in variables:
            if id(variable) not in known:
                shape = f" of shape {list(variable.shape)}" if isinstance(variable, torch.Tensor) else ""
                raise ValueError(f"{type(variable).__name__}{shape} is not a parameter of this optimizer")
