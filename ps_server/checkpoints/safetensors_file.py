"""The safetensors format: lays out a file, and reads the head of one. No checkpoint policy here.

Both are written by hand. The library's writer uses its own temporary file, which stays if the process is killed; it
also ignores the umask and hides the error number. The library's reader maps the file, so the process dies if the file
is truncated meanwhile, and it panics on some malicious files.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.manifest import ALIGNMENT_BYTES, DTYPES, MAX_DIMENSIONS, dtype_name
from ps_server.checkpoints import strict_json

__all__ = ["Head", "Layout", "MAX_HEAD_BYTES", "Tensor", "bytes_of", "lay_out", "read_head", "save"]

MAX_HEAD_BYTES = 64 << 20
"""The most bytes before the tensors. The longest manifest that fits a message takes less."""
_LENGTH_BYTES = 8
_ENTRIES_AT_ONCE = 1000
_METADATA = "__metadata__"
_MAX_FIELDS = 1000
_MAX_EXTENT = 2**63 - 1
_TENSOR_TYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_NAMES = {name: dtype for dtype, name in _TENSOR_TYPES.items()}


@dataclass(frozen=True)
class Layout:
    """The layout of a file to be written.

    Args:
        head: its first bytes.
        names: the arrays whose bytes follow, in this order and without gaps.
    """

    head: bytes
    names: Sequence[str]


def lay_out(arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> Layout:
    """Lays out a file with these arrays and this metadata. Raises OSError if the format cannot hold them."""
    if _METADATA in arrays:
        raise OSError(errno.EINVAL, f"a safetensors file cannot have a variable named {_METADATA}")
    # The widest elements first, so that all are aligned, as readers expect.
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    header: dict[str, Any] = {_METADATA: dict(about)}
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        tensor_type = _TENSOR_TYPES[dtype_name(array.dtype)]
        header[name] = {"dtype": tensor_type, "shape": array.shape, "data_offsets": [begin, end]}
    text = _json_of(header)
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    if len(text) + _LENGTH_BYTES > MAX_HEAD_BYTES:
        raise OSError(errno.EFBIG, f"the names of {len(names)} variables are too long for a safetensors file")
    return Layout(len(text).to_bytes(_LENGTH_BYTES, "little") + text, names)


def _json_of(header: Mapping[str, Any]) -> bytes:
    # In pieces: json.dumps of 65,536 variables at once would block all other threads for a quarter of a second.
    entries = list(header.items())
    pieces = [
        json.dumps(dict(entries[start : start + _ENTRIES_AT_ONCE]))[1:-1]
        for start in range(0, len(entries), _ENTRIES_AT_ONCE)
    ]
    return f"{{{', '.join(pieces)}}}".encode()


def save(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
    """Writes a file next to ``path`` and renames it when it is complete. Raises OSError."""
    layout = lay_out(arrays, about)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(layout.head)
            for name in layout.names:
                file.write(bytes_of(arrays[name]))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array; a view."""
    return array.reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class Tensor:
    """The position of an array in the file's body.

    Args:
        dtype: a key of DTYPES.
        shape: the extents.
        begin: its first byte.
        end: the byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Head:
    """The parsed head of a file.

    Args:
        content: the bytes of the head; the body follows.
        about: the metadata.
        tensors: by name; they fill the body without gaps.
        body_size_bytes: the size of all tensors together.
    """

    content: bytes
    about: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    body_size_bytes: int


def read_head(descriptor: int, file_size_bytes: int) -> Head:
    """Reads the head of a file at the descriptor's current position, and stops before the body.

    Raises:
        ValueError: the file is not a complete safetensors file; the message says why.
        OSError: the file cannot be read.
    """
    length = os.read(descriptor, _LENGTH_BYTES)
    text_size_bytes = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or text_size_bytes > min(file_size_bytes, MAX_HEAD_BYTES) - _LENGTH_BYTES:
        raise ValueError(f"its {file_size_bytes} bytes are not a safetensors file, or not all of one")
    text = bytearray()
    while len(text) < text_size_bytes:
        block = os.read(descriptor, text_size_bytes - len(text))
        if not block:
            raise ValueError("it ends in the middle of its header")
        text += block
    # The head is no larger than the file, so the memory used below is in proportion to the file.
    header = strict_json.map_of(strict_json.parse(text.decode()), "its head", len(text), lambda _, value: value)
    about = strict_json.map_of(header.pop(_METADATA, {}), "its metadata", _MAX_FIELDS, _field)
    tensors = {strict_json.text(name, "the name"): _tensor(name, value) for name, value in header.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"there is a gap before {name!a}, or others share its bytes")
        end = tensor.end
    if _LENGTH_BYTES + text_size_bytes + end != file_size_bytes:
        raise ValueError(f"it has {file_size_bytes} bytes, and its header says {_LENGTH_BYTES + text_size_bytes + end}")
    return Head(length + text, about, tensors, end)


def _field(name: str, value: Any) -> str:
    return strict_json.text(value, strict_json.text(name, "the name"))


def _tensor(name: str, value: Any) -> Tensor:
    fields = strict_json.map_of(value, "a tensor", 3, lambda _, each: each)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor has other fields than dtype, shape, data_offsets")
    tensor_type = strict_json.text(fields["dtype"], "dtype")
    if tensor_type not in _DTYPE_NAMES:
        raise ValueError(f"{name!a} is of dtype {tensor_type!a}; only {', '.join(_DTYPE_NAMES)} are averaged")
    dtype = _DTYPE_NAMES[tensor_type]
    shape = tuple(strict_json.list_of(fields["shape"], "shape", MAX_DIMENSIONS, _extent))
    offsets = strict_json.list_of(fields["data_offsets"], "data_offsets", 2, _extent)
    if len(offsets) != 2:
        raise ValueError(f"{name!a} has {len(offsets)} data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name!a} of shape {shape} does not fit its bytes, {begin} to {end}")
    return Tensor(dtype, shape, begin, end)


def _extent(value: Any) -> int:
    return strict_json.whole_number(value, "extent", 0, _MAX_EXTENT)
