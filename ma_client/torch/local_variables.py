"""The local variables of a worker: the tensors of its model that are averaged, read and written as host arrays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ma_client.tensors.mirror import HostMirror
from ma_client.torch.custom_getter import ModelAverageCustomGetter

__all__ = ["LocalVariables"]

_Arrays = Mapping[str, NDArray[np.generic]]


class LocalVariables:
    """The averaged tensors of the getter's model. Which ones they are is fixed by the first `gather`.

    Args:
        getter: knows the model and its center variables.
        use_locking: whether `locked` takes the lock.

    Attributes:
        lock: a reentrant lock, for threads that read the model while it is trained.
    """

    def __init__(self, getter: ModelAverageCustomGetter, use_locking: bool) -> None:
        self.getter = getter
        self.lock = threading.RLock()
        self._use_locking = use_locking
        self._mirror: HostMirror | None = None

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
        return self._host_mirror().gather()

    def gather_parameters(self) -> dict[str, NDArray[np.generic]]:
        """The values of those that are parameters, not buffers, at present."""
        parameters = {n: v for n, v in self.getter.variables().items() if isinstance(v, torch.nn.Parameter)}
        return HostMirror(parameters).gather()

    def install(self, center: _Arrays, kept: Collection[str]) -> None:
        """Writes the center into the tensors, except the variables in ``kept``; the lock is held meanwhile."""
        with self.locked():
            self._host_mirror().scatter(center, skip=kept)

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which `lock` is held, if locking is used."""
        return self.lock if self._use_locking else contextlib.nullcontext()

    def _host_mirror(self) -> HostMirror:
        if self._mirror is None:
            self._mirror = HostMirror(self.getter.variables())
        else:
            self._mirror.follow(self.getter.tensors(self._mirror.names))
        return self._mirror
