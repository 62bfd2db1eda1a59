"""Nested dictionaries of arrays, as JAX and others keep a model, and the flat names that the center has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import InvalidRequestError

__all__ = ["Paths", "as_arrays", "nest", "paths_of"]

Paths = Mapping[str, tuple[str, ...]]
"""By name of a center variable, the keys that lead to it."""

_SEPARATOR = "/"


def paths_of(tree: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The leaves of a tree: its own names if it is flat, else their keys joined by "/".

    Raises:
        InvalidRequestError: a key is no string, or two leaves have the same name.
    """
    paths = dict[str, tuple[str, ...]]()
    for path in _paths(tree, ()):
        name = _SEPARATOR.join(path)
        if name in paths:
            raise InvalidRequestError(f"two variables are named {name!r}: {paths[name]} and {path}; rename one")
        paths[name] = path
    return paths


def as_arrays(tree: Mapping[str, Any], paths: Paths) -> dict[str, NDArray[Any]]:
    """The leaves as numpy arrays, by name; views wherever their memory allows.

    Args:
        tree: of whatever numpy can read: arrays, numbers, objects with the array interface or DLPack.
        paths: its own, from `paths_of`.
    """
    return {name: _as_array(_at(tree, path)) for name, path in paths.items()}


def nest(arrays: Mapping[str, NDArray[Any]], paths: Paths) -> Mapping[str, Any]:
    """The arrays in the structure that the paths came from; flat ones as they are."""
    if all(len(path) == 1 for path in paths.values()):
        return arrays
    tree = dict[str, Any]()
    for name, path in paths.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = arrays[name]
    return tree


def _paths(tree: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if not isinstance(key, str):
            raise InvalidRequestError(f"the key {key!r} is no string; variables are named by strings")
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
        else:
            yield *above, key


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _as_array(value: Any) -> NDArray[Any]:
    # Who has both means the array interface to be used: DLPack knows fewer types.
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    return np.asarray(value)
