"""Which tensors of a model are center variables, and their names. Modelled on TensorFlow 1.15's custom getter."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from ma_client.tensors.refused_tensors import can_be_averaged, dtype_of, kind_of, why_refused
from ma_client.torch.center_names import Tensors, names_by_tensor, tensors_of
from ma_client.torch.tensor_places import TensorPlaces
from modelaverage.errors import ConflictError, Reason
from modelaverage.logs import event
from modelaverage.manifest import DTYPES

__all__ = ["GLOBAL_VARIABLE_NAME", "ModelAverageCustomGetter"]

GLOBAL_VARIABLE_NAME = "global_center_variable"
"""The scope of center variables in TensorFlow 1.15: local ``w`` averages into ``global_center_variable/w``."""

_log = logging.getLogger("ma_client")
_NAMED = 4


class ModelAverageCustomGetter:
    """Moves a model to the worker's device and knows its center variables.

    Center variables are the parameters that are trained (``requires_grad``), tied ones once; unless
    ``average_buffers`` is False, the floating-point buffers that are part of the state dict (BatchNorm's statistics);
    and what ``also_average`` names. Buffers that cannot be averaged (integers, booleans, complex, float8, sparse)
    stay local, which is logged once.

    Names are those in the model, without what wrappers add to them (`torch.compile`, DistributedDataParallel,
    DataParallel, activation checkpointing): it makes no difference whether a worker wraps its model, or when.

    Source: ``ModelAverageCustomGetter`` of TensorFlow 1.15, which is a variable getter there: it had trainable
    variables only, which ``average_buffers=False`` gives exactly.

    Args:
        worker_device: where the model computes: "cpu", "cuda:0", a torch.device.
        average_buffers: whether buffers are center variables as well.
        also_average: names of further parameters (without gradients) or buffers that have to be the same on all
            workers: an EMA teacher, statistics. ``*``, ``?`` and ``[...]`` stand for characters
            (`fnmatch`): "teacher.*".

    Raises:
        TypeError: ``also_average`` has something that is not a string.

    Example:
        >>> getter = ModelAverageCustomGetter(worker_device="cpu")
        >>> model = getter(Net())
    """

    def __init__(
        self,
        worker_device: torch.device | str,
        average_buffers: bool = True,
        *,
        also_average: Iterable[str] = (),
    ) -> None:
        self.worker_device = torch.device(worker_device)
        self.average_buffers = average_buffers
        self.also_average = (also_average,) if isinstance(also_average, str) else tuple(also_average)
        for pattern in self.also_average:
            if not isinstance(pattern, str):
                raise TypeError(f"also_average has {type(pattern).__name__}; give names, such as 'teacher.*'")
        self._model: torch.nn.Module | None = None
        self._looked_at: Mapping[str, torch.Tensor] = {}
        self._places: TensorPlaces | None = None

    def __getstate__(self) -> dict[str, object]:
        # A copy has a model of its own.
        return {**self.__dict__, "_places": None}

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves ``model`` to the worker's device and returns it.

        Raises:
            ValueError: this getter has a model already; a variable cannot be averaged: a lazy one without a shape, one
                on the device meta, a subclass of Tensor other than DTensor, a trained one of another element type, a
                flat parameter of FSDP1; two variables have the same name; or a pattern of ``also_average`` matches
                nothing.
        """
        if self._model is not None:
            raise ValueError("this ModelAverageCustomGetter has a model already; make one getter for each model")
        local = self._select(model)[1]
        self._check_values(model)
        self._model = model.to(self.worker_device)
        if local:
            names = sorted(local)
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            # Users expect counters and masks to stay local, but not tensors with fractions.
            level = logging.WARNING if any(_has_fractions(tensor) for tensor in local.values()) else logging.INFO
            _log.log(
                level,
                "stays local in each worker, because it cannot be averaged: %s%s",
                ", ".join(f"{name} ({kind_of(local[name])})" for name in names[:_NAMED]),
                more,
                extra=event("stays_local", variables=names[:_NAMED], variables_omitted=max(0, len(names) - _NAMED)),
            )
        return self._model

    @property
    def model(self) -> torch.nn.Module:
        """The model. Raises ValueError before there is one."""
        if self._model is None:
            raise ValueError("ma_custom_getter has no model yet: call it, `model = getter(Net())`")
        return self._model

    def variables(self) -> dict[str, torch.Tensor]:
        """The local variables that are averaged, by name, in the model's order.

        Raises:
            ValueError: the model has become one that cannot be averaged since it was given to this getter.
        """
        return self._select(self.model)[0]

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """All parameters of the model, including those that are not averaged, by their names here."""
        return tensors_of(self.model).parameters

    def other_names(self) -> dict[str, list[str]]:
        """By name of a tied center variable, the other names of its tensor in the model."""
        names = names_by_tensor(self.model)
        others = {name: [n for n in names.get(id(t), ()) if n != name] for name, t in self.variables().items()}
        return {name: other for name, other in others.items() if other}

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The model's present parameters and buffers of these names: a module may have replaced a buffer.

        Raises:
            ConflictError: MANIFEST_MISMATCH: one no longer exists, or can no longer be averaged.
        """
        names = list(names)
        if self._places is not None and self._places.are_same() and names == list(self._looked_at):
            return dict(self._looked_at)
        model = tensors_of(self.model)
        there = model.parameters | model.buffers
        try:
            found = {name: there[name] for name in names}
        except KeyError:
            raise ConflictError(_what_is_gone(names, there), Reason.MANIFEST_MISMATCH) from None
        for name, tensor in found.items():
            if tensor is not self._looked_at.get(name):
                problem = why_refused(name, tensor)
                if problem is not None:
                    raise ConflictError(problem, Reason.MANIFEST_MISMATCH)
        self._looked_at, self._places = found, TensorPlaces(self.model, found)
        return dict(found)

    @property
    def local_to_center(self) -> dict[str, str]:
        """TensorFlow 1.15's name of the center variable for each local one."""
        return {name: f"{GLOBAL_VARIABLE_NAME}/{name}" for name in self.variables()}

    def _select(self, model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The center variables, and the buffers that cannot be center variables. Raises ValueError."""
        there = tensors_of(model)
        also = self._also(there)
        chosen = {name: tensor for name, tensor in there.parameters.items() if tensor.requires_grad or name in also}
        for name, tensor in chosen.items():
            _check(name, tensor)
            if not can_be_averaged(tensor):
                raise ValueError(
                    f"variable {name!r} has dtype {dtype_of(tensor)}; only {', '.join(DTYPES)} can be averaged: "
                    "convert it before you give the model to the getter, or freeze it (requires_grad=False)"
                )
        local = dict[str, torch.Tensor]()
        for name, tensor in there.buffers.items():
            if name not in also and not (self.average_buffers and name in there.kept):
                continue
            if can_be_averaged(tensor):
                _check(name, tensor)
                chosen[name] = tensor
            else:
                local[name] = tensor
        _check_matches(self.also_average, chosen)
        return chosen, local

    def _check_values(self, model: torch.nn.Module) -> None:
        """Raises ValueError if a tensor, center variable or not, cannot be moved to the worker's device."""
        if self.worker_device.type == "meta":
            return
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise ValueError(why_refused(name, tensor))

    def _also(self, there: Tensors) -> set[str]:
        if not self.also_average:
            return set()
        names = (*there.parameters, *there.buffers)
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in self.also_average)}


def _check(name: str, tensor: torch.Tensor) -> None:
    problem = why_refused(name, tensor)
    if problem is not None:
        raise ValueError(problem)


def _check_matches(patterns: Iterable[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"also_average has {pattern!r}, which matches no parameter and no buffer that can be averaged; names "
                "are those of named_parameters() and named_buffers(), in full"
            )


def _has_fractions(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _what_is_gone(names: Sequence[str], there: Mapping[str, torch.Tensor]) -> str:
    gone = [name for name in names if name not in there]
    new = there.keys() - set(names)
    # Pruning `0.weight` adds `0.weight_orig`; parametrizing it adds `0.parametrizations.weight.original`.
    path, _, last = gone[0].rpartition(".")
    near = [name for name in there if name in new and name.startswith(path) and last in name[len(path) :]]
    now = f" (the model has {near[0]!r} now)" if near else ""
    more = f", and {len(gone) - 1} more," if len(gone) > 1 else ""
    verb = "are" if len(gone) > 1 else "is"
    return (
        f"variable {gone[0]!r}{more} {verb} no longer in the model{now}, but still in the center, whose variables are "
        "fixed when the chief initializes it: prune, parametrize, add or remove layers before you make the optimizer, "
        "or undo it before the next round"
    )
