"""Models for cases, how they lie in fragments, and their averages by numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import Codec, codec_named
from modelaverage.conformance.lines import Arrays
from modelaverage.manifest import Manifest, Variable, dtype_name

__all__ = [
    "average",
    "coded_fragments_of",
    "decoded",
    "fragments_of",
    "like",
    "manifest_of",
    "mixed",
    "size_bytes_of",
    "unflatten",
    "vector",
]


def manifest_of(arrays: Arrays, fragment_size_bytes: int = 64) -> Manifest:
    """The manifest of these variables, in their order."""
    variables = tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())
    return Manifest(variables, fragment_size_bytes)


def fragments_of(arrays: Arrays, fragment_size_bytes: int = 64) -> list[bytes]:
    """The flat buffer, cut into fragments."""
    manifest = manifest_of(arrays, fragment_size_bytes)
    values = [memoryview(array.tobytes()) for array in arrays.values()]
    return [b"".join(manifest.fragment_parts(index, values)) for index in range(manifest.fragment_count)]


def coded_fragments_of(arrays: Arrays, base: Arrays, fragment_size_bytes: int, codec: str) -> list[bytes]:
    """The fragments in a codec, relative to ``base``."""
    manifest, encoder = manifest_of(arrays, fragment_size_bytes), codec_named(codec)
    values = [memoryview(array.tobytes()) for array in arrays.values()]
    flat = _flat(manifest, base)
    return [
        b"".join(encoder.encode_variables(manifest, index, values, flat)) for index in range(manifest.fragment_count)
    ]


def decoded(codec: Codec, manifest: Manifest, fragments: Sequence[bytes], base: bytes) -> bytes:
    """The flat buffer that these fragments describe; ``base`` is one, too."""
    flat, theirs = np.zeros(manifest.buffer_size_bytes, np.uint8), np.frombuffer(base, np.uint8)
    for index, data in enumerate(fragments):
        codec.decode_into(manifest, flat, index, memoryview(data), theirs)
    return flat.tobytes()


def _flat(manifest: Manifest, arrays: Arrays) -> NDArray[np.uint8]:
    flat = np.zeros(manifest.buffer_size_bytes, np.uint8)
    for room, array in zip(manifest.arrays(flat).values(), arrays.values(), strict=True):
        room[...] = array
    return flat


def unflatten(manifest: Manifest, flat: bytes) -> Arrays:
    """The variables in a flat buffer."""
    return manifest.arrays(np.frombuffer(flat, np.uint8))


def size_bytes_of(arrays: Arrays) -> int:
    """How many bytes of fragments a whole push of these variables has, including padding."""
    return manifest_of(arrays).buffer_size_bytes


def vector(elements: int, start: float = 0.0, dtype: Any = np.float32) -> Arrays:
    """One variable, counting from ``start``."""
    return {"w": (np.arange(elements) + start).astype(dtype)}


def mixed() -> Arrays:
    """Every type, a scalar, an empty variable, and padding."""
    return {
        "w": np.arange(30, dtype=np.float32).reshape(5, 6),
        "scale": np.array(0.5, np.float16),
        "nothing": np.zeros((0, 4), np.float64),
        "b": np.arange(7, dtype=np.float64) / 3,
        "half": np.arange(9, dtype=np.float16).reshape(3, 3),
        "brain": np.arange(31).astype(ml_dtypes.bfloat16),
        "last": np.zeros(0, np.float32),
    }


def like(arrays: Arrays, seed: int) -> Arrays:
    """Random values of many magnitudes for the same variables; the same seed gives the same values."""
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=array.shape) * 10.0 ** random.integers(-2, 3, array.shape)).astype(array.dtype)
        for name, array in arrays.items()
    }


def average(*models: Arrays) -> Arrays:
    """Sum, then divide, in the variable's own precision; 16-bit ones in float32, rounded once."""
    return {name: _mean([model[name] for model in models]) for name in models[0]}


def _mean(values: list[NDArray[Any]]) -> NDArray[Any]:
    dtype = values[0].dtype
    wide = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    total = np.zeros(values[0].shape, wide)
    for number, value in enumerate(values):
        total = value.astype(wide) if number == 0 else total + value.astype(wide)
    return np.asarray(total / wide.type(len(values))).astype(dtype)
