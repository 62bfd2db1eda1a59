"""The local variables of a worker: the tensors of its model that are averaged, read and written as host arrays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.torch.custom_getter import ModelAverageCustomGetter
from ma_client.torch.gradient_sync import warn_if_gradients_are_shared

__all__ = ["LocalVariables", "Mirror"]

_Arrays = Mapping[str, NDArray[np.generic]]


class Mirror(Protocol):
    """A model's center variables as host arrays, as `HostMirror` has them."""

    @property
    def names(self) -> list[str]:
        """Names of the variables."""

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Mirrors these tensors, of the same names, from now on."""

    def gather(self) -> dict[str, NDArray[np.generic]]:
        """The present values by name."""

    def scatter(self, arrays: _Arrays, skip: Collection[str] = ()) -> None:
        """Writes these arrays into the tensors, except those in ``skip``."""


class LocalVariables:
    """The averaged tensors of the getter's model. Which ones they are is fixed by the first `gather`.

    Args:
        getter: knows the model and its center variables.
        use_locking: whether `locked` takes the lock.
        mirror_of: makes the host arrays of a model's tensors.
        ranks: the ranks of this worker in torch.distributed; empty: it is one process.

    Attributes:
        lock: a reentrant lock, for threads that read the model while it is trained.
    """

    def __init__(
        self,
        getter: ModelAverageCustomGetter,
        use_locking: bool,
        mirror_of: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], Mirror],
        ranks: frozenset[int] = frozenset(),
    ) -> None:
        self.getter = getter
        self._mirror_of = mirror_of
        self._ranks = ranks
        self.lock = threading.RLock()
        self._use_locking = use_locking
        self._mirror: Mirror | None = None

    @property
    def are_fixed(self) -> bool:
        """Whether it is fixed which variables are averaged."""
        return self._mirror is not None

    def gather(self) -> dict[str, NDArray[np.generic]]:
        """Their values by name. Do not write to the arrays, which may be the tensors' own memory, and valid until the
        next call.

        Raises:
            ConflictError: MANIFEST_MISMATCH: a tensor is gone, or has another shape or element type than at first.
        """
        return self.mirror().gather()

    def gather_parameters(self) -> dict[str, NDArray[np.generic]]:
        """The values of those that are parameters, not buffers, at present."""
        parameters = {n for n, v in self.getter.variables().items() if isinstance(v, torch.nn.Parameter)}
        return {name: array for name, array in self.gather().items() if name in parameters}

    def frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that are not averaged, by name. Empty for a worker of several ranks, each of which may have a
        part of them."""
        if len(self._ranks) > 1:
            return {}
        averaged = self.getter.variables()
        return {name: tensor for name, tensor in self.getter.named_parameters().items() if name not in averaged}

    def install(self, center: _Arrays, kept: Collection[str]) -> None:
        """Writes the center into the tensors, except the variables in ``kept``; the lock is held meanwhile."""
        with self.locked():
            self.mirror().scatter(center, skip=kept)

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which `lock` is held, if locking is used."""
        return self.lock if self._use_locking else contextlib.nullcontext()

    def warn_if_gradients_are_shared(self) -> None:
        """Logs one warning if the model's gradients are averaged with processes that are not this worker's."""
        warn_if_gradients_are_shared(self.getter.model, self._ranks)

    def mirror(self) -> Mirror:
        """The host arrays of the tensors as they are at present.

        Raises:
            ConflictError: as `gather`.
        """
        if self._mirror is None:
            self._mirror = self._mirror_of(self.getter.model, self.getter.variables())
        else:
            self._mirror.follow(self.getter.tensors(self._mirror.names))
        return self._mirror
