"""The parameters that the local optimizer updates, and their names in the getter's model."""

from __future__ import annotations

import weakref
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
        self.groups_changed()

    def all(self) -> list[torch.Tensor]:
        """Every parameter, in the order of the groups."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def groups_changed(self) -> None:
        """Reads the groups again: parameters were added or replaced."""
        parameters = self.all()
        self.check_in_model(parameters)
        names = {id(parameter): name for name, parameter in self._getter.named_parameters().items()}
        self._named = [names[id(parameter)] for parameter in parameters]
        # Weakly: accelerate replaces whole parameters by this rank's parts, to free the memory of the whole ones.
        self._seen = [weakref.ref(parameter) for parameter in parameters]

    @property
    def names(self) -> Mapping[torch.Tensor, str]:
        """Their names in the model. Raises ValueError if a parameter is not in it."""
        return dict(self._with_names())

    def with_gradient(self) -> set[str]:
        """Names of the parameters that have a gradient at present. Raises ValueError if a parameter is not in the
        model."""
        return {name for parameter, name in self._with_names() if parameter.grad is not None}

    def _with_names(self) -> Iterable[tuple[torch.Tensor, str]]:
        parameters = self.all()
        if len(parameters) != len(self._seen) or any(
            seen() is not parameter for seen, parameter in zip(self._seen, parameters, strict=True)
        ):  # in the lists of the groups, where `__setattr__` does not see it
            self.groups_changed()
        return zip(parameters, self._named, strict=True)

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
