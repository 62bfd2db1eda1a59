"""The codec `int8` in plain numpy, written from docs/protocol.md ("Codecs"); nothing else is needed to speak it.

A fragment is coded piece by piece: of each variable the part that lies in the fragment. A worker that is written with
the generated stubs needs two calls in each round: `encode_model` before its push, and `decode_model` after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode", "decode_model", "encode", "encode_model"]

BLOCK = 128
LEVELS = 127
# A block with a change from here on is special, as one with a change that is not finite.
HUGE = {"float32": 2.0**100, "bfloat16": 2.0**100, "float16": 2.0**7}
LARGEST = np.finfo(np.float32).max
LARGEST_OF = {"float32": LARGEST, "bfloat16": np.float32(3.3895313892515355e38), "float16": np.float32(65504)}
LEAST_ELEMENTS = 1024

Array = NDArray[Any]
Arrays = Mapping[str, Array]
"""Variables in the order of the manifest. The padding between them is not in an encoded fragment."""


def encode_model(local: Arrays, base: Arrays, fragment_size_bytes: int) -> list[bytes]:
    """The data of every fragment of a push. ``base``: the center from which ``local`` was trained."""
    fragments = list[bytes]()
    for places in pieces(base, fragment_size_bytes):
        data = b""
        for name, part in places:
            values, theirs = local[name].reshape(-1)[part], base[name].reshape(-1)[part]
            data += encode(values, theirs) if is_coded(base[name].size, theirs) else values.tobytes()
        fragments.append(data)
    return fragments


def decode_model(fragments: Sequence[bytes], base: Arrays, fragment_size_bytes: int) -> dict[str, Array]:
    """The center that came; ``base`` as it was pushed from."""
    center = {name: np.empty_like(value) for name, value in base.items()}
    for data, places in zip(fragments, pieces(base, fragment_size_bytes), strict=True):
        at = 0
        for name, part in places:
            theirs = base[name].reshape(-1)[part]
            coded = is_coded(base[name].size, theirs)
            begin, at = at, at + (size_bytes(theirs.size) if coded else theirs.nbytes)
            piece = data[begin:at]
            center[name].reshape(-1)[part] = decode(piece, theirs) if coded else np.frombuffer(piece, theirs.dtype)
    return center


def pieces(variables: Arrays, fragment_size_bytes: int) -> list[list[tuple[str, slice]]]:
    """For every fragment, the elements of each variable that lie in it. Variables start at multiples of 8 bytes."""
    places, start, end = list[list[tuple[str, slice]]](), 0, 0
    for name, array in variables.items():
        start = -(-end // 8) * 8 if array.size else end
        end = start + array.nbytes
        for index in range(start // fragment_size_bytes, -(-end // fragment_size_bytes) if array.size else 0):
            places += [[] for _ in range(index + 1 - len(places))]
            first = max(start, index * fragment_size_bytes) - start
            last = min(end, (index + 1) * fragment_size_bytes) - start
            places[index].append((name, slice(first // array.itemsize, last // array.itemsize)))
    return places


def is_coded(variable_size: int, piece: Array) -> bool:
    """Whether a piece is coded; ``variable_size``: the elements of its variable."""
    return piece.dtype.name in HUGE and variable_size >= LEAST_ELEMENTS and size_bytes(piece.size) < piece.nbytes


def size_bytes(count: int) -> int:
    """The size of a coded piece of ``count`` elements."""
    return -(-count // BLOCK) * (4 + BLOCK)


def encode(values: Array, base: Array) -> bytes:
    """A coded piece: the change from ``base`` to ``values``, both one-dimensional."""
    ours, theirs = _blocks(values), _blocks(base)
    with np.errstate(all="ignore"):
        change = theirs - ours
        magnitude = np.abs(change).max(axis=1)  # NaN if there is one
        scale, code = _scaled(change, LEVELS)
        special = ~(magnitude < HUGE[values.dtype.name])  # also if NaN
        finite = np.isfinite(ours)
        change = np.where(finite, np.clip(_finite(theirs) - ours, -LARGEST, LARGEST), np.float32(0))
        other_scale, other_code = _scaled(change, LEVELS - 1)
        other_code = np.where(finite, other_code, np.sign(ours) * np.float32(LEVELS))
        other_code = np.where(np.isnan(ours), np.float32(-LEVELS - 1), other_code)
        scale = np.where(special, -other_scale, scale)
        code = np.where(special[:, None], other_code, code)
        return scale.astype("<f4").tobytes() + code.astype(np.int8).tobytes()


def decode(data: bytes, base: Array) -> Array:
    """The values of a coded piece, of the dtype of ``base``."""
    theirs = _blocks(base)
    count = len(theirs)
    scale = np.frombuffer(data, "<f4", count).astype(np.float32)
    code = np.frombuffer(data, np.int8, offset=4 * count).reshape(count, BLOCK).astype(np.float32)
    largest = LARGEST_OF[base.dtype.name]
    with np.errstate(all="ignore"):
        values = theirs - code * scale[:, None]
        change = np.clip(code * np.abs(scale)[:, None], -LARGEST, LARGEST)
        others = np.clip(_finite(theirs) - change, -largest, largest)
        others = np.where(np.abs(code) == LEVELS, np.copysign(np.float32(np.inf), code), others)
        others = np.where(code == -LEVELS - 1, np.where(np.isnan(theirs), theirs, np.float32(np.nan)), others)
        values = np.where(np.signbit(scale)[:, None], others, values)
        return values.reshape(-1)[: base.size].astype(base.dtype)


def _blocks(array: Array) -> NDArray[np.float32]:
    """As float32, shape (blocks, 128), filled up with zeros."""
    blocks = np.zeros((-(-array.size // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: array.size] = array
    return blocks


def _scaled(change: NDArray[np.float32], levels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scale of each block, and the codes."""
    scale = np.abs(change).max(axis=1) / np.float32(levels)
    scale = np.where(scale < np.float32(2.0**-126), np.float32(0), scale)
    return scale, np.where(scale[:, None] == 0, np.float32(0), np.rint(change / scale[:, None]))


def _finite(base: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isfinite(base), base, np.float32(0))
