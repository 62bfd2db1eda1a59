"""Nested dictionaries of arrays, in which JAX and others keep a model, and their flat names in the center."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import InvalidRequestError

__all__ = ["Paths", "as_arrays", "nest", "paths_of"]

Paths = Mapping[str, tuple[str, ...]]
"""For each leaf's name in the center, the keys that lead to it."""

_SEPARATOR = "/"


def paths_of(tree: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The paths of a tree's leaves. In a flat tree, a leaf has its own name; otherwise its keys, joined by "/".

    Raises:
        InvalidRequestError: a key is not a string, or two leaves have the same name.
    """
    paths: dict[str, tuple[str, ...]] = {}
    for path in _paths(tree, ()):
        name = _SEPARATOR.join(path)
        if name in paths:
            raise InvalidRequestError(f"two variables are named {name!r}: {paths[name]} and {path}; rename one")
        paths[name] = path
    return paths


def as_arrays(tree: Mapping[str, Any], paths: Paths) -> dict[str, NDArray[Any]]:
    """The leaves as numpy arrays, by name; views where their memory allows.

    Args:
        tree: its leaves are what numpy can read: arrays, numbers, objects with the array interface or DLPack.
        paths: the tree's, from `paths_of`.
    """
    return {name: _as_array(_at(tree, path)) for name, path in paths.items()}


def nest(arrays: Mapping[str, NDArray[Any]], paths: Paths) -> Mapping[str, Any]:
    """Puts arrays into the structure that the paths describe; returns flat ones as they are."""
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
            raise InvalidRequestError(f"the key {key!r} is not a string; variables are named by strings")
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
        else:
            yield *above, key


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _as_array(value: Any) -> NDArray[Any]:
    # If an object has both, the array interface is used: DLPack has fewer types.
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    return np.asarray(value)
