"""The line protocol between the kit and a client program (docs/conformance.md). Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelaverage.conformance.miss import Miss, short
from modelaverage.manifest import DTYPES, dtype_name

__all__ = [
    "Arrays",
    "Failed",
    "Initialized",
    "Pulled",
    "Pushed",
    "Status",
    "describe",
    "initialize_line",
    "push_line",
    "read_initialized",
    "read_left",
    "read_pulled",
    "read_pushed",
    "read_status",
    "same",
]

Arrays = Mapping[str, NDArray[Any]]
"""Variables by name, in the order of the manifest."""

_TYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
_DTYPES = {short_name: DTYPES[name] for name, short_name in _TYPES.items()}
_OUTCOMES = ("committed", "stale", "already_counted")
_PHASES = ("uninitialized", "idle", "averaging", "stopping")


@dataclass(frozen=True)
class Failed:
    """`error NAME MESSAGE`."""

    name: str
    message: str


@dataclass(frozen=True)
class Initialized:
    """`ok initialized|already GLOBAL_STEP`."""

    by_this_call: bool
    global_step: int


@dataclass(frozen=True)
class Pulled:
    """`ok GLOBAL_STEP VARIABLE...`."""

    global_step: int
    center: Arrays


@dataclass(frozen=True)
class Pushed:
    """`ok OUTCOME GLOBAL_STEP CONTRIBUTORS VARIABLE...`."""

    outcome: str
    global_step: int
    contributors: tuple[str, ...]
    center: Arrays


@dataclass(frozen=True)
class Status:
    """`ok PHASE GLOBAL_STEP`."""

    phase: str
    global_step: int


def initialize_line(arrays: Arrays, global_step: int, fragment_size_bytes: int) -> str:
    """The command that sets the center."""
    words = [f"{name.encode().hex()}:{_type(array)}:{_shape(array)}:{_bytes(array)}" for name, array in arrays.items()]
    return " ".join(["initialize", str(global_step), str(fragment_size_bytes), *words])


def push_line(arrays: Arrays) -> str:
    """The command that pushes these values."""
    return " ".join(["push", *map(_bytes, arrays.values())])


def read_initialized(line: str) -> Initialized | Failed:
    """The answer to `initialize`. Raises Miss if it is malformed."""
    words = _words(line, "ok initialized|already GLOBAL_STEP")
    if isinstance(words, Failed):
        return words
    match words:
        case [("initialized" | "already") as how, step]:
            return Initialized(how == "initialized", _step(step, line))
    raise Miss("ok initialized|already GLOBAL_STEP", short(line))


def read_pulled(line: str) -> Pulled | Failed:
    """The answer to `pull`. Raises Miss if it is malformed."""
    words = _words(line, "ok GLOBAL_STEP VARIABLE...")
    if isinstance(words, Failed):
        return words
    if not words:
        raise Miss("ok GLOBAL_STEP VARIABLE...", short(line))
    return Pulled(_step(words[0], line), _center(words[1:]))


def read_pushed(line: str) -> Pushed | Failed:
    """The answer to `push`. Raises Miss if it is malformed."""
    words = _words(line, "ok OUTCOME GLOBAL_STEP CONTRIBUTORS VARIABLE...")
    if isinstance(words, Failed):
        return words
    match words:
        case [outcome, step, contributors, *center] if outcome in _OUTCOMES and contributors:
            names = () if contributors == "-" else tuple(contributors.split(","))
            return Pushed(outcome, _step(step, line), names, _center(center))
    raise Miss(f"ok {'|'.join(_OUTCOMES)} GLOBAL_STEP CONTRIBUTORS VARIABLE...", short(line))


def read_status(line: str) -> Status | Failed:
    """The answer to `status`. Raises Miss if it is malformed."""
    words = _words(line, "ok PHASE GLOBAL_STEP")
    if isinstance(words, Failed):
        return words
    match words:
        case [phase, step] if phase in _PHASES:
            return Status(phase, _step(step, line))
    raise Miss(f"ok {'|'.join(_PHASES)} GLOBAL_STEP", short(line))


def read_left(line: str) -> Failed | None:
    """The answer to `leave` or `finish`. Raises Miss if it is malformed."""
    words = _words(line, "ok")
    if words:
        if isinstance(words, Failed):
            return words
        raise Miss("ok", short(line))
    return None


def describe(arrays: Arrays) -> str:
    """Variables as they are written in a line."""
    words = [f"{name}:{_type(array)}:{_shape(array)}:{_bytes(array)}" for name, array in arrays.items()]
    return " ".join(words)


def same(one: Arrays, other: Arrays) -> bool:
    """Whether names, their order, types, shapes and all bits are the same."""
    return list(one) == list(other) and all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in one
    )


def _words(line: str, expected: str) -> list[str] | Failed:
    """The words after `ok`, or the error."""
    first, *words = line.split(" ")
    match first, words:
        case "ok", words:
            return words
        case "error", [name, *message] if name:
            return Failed(name, " ".join(message))
    raise Miss(f"{expected}, or error NAME MESSAGE", short(line))


def _type(array: NDArray[Any]) -> str:
    return _TYPES[dtype_name(array.dtype)]


def _shape(array: NDArray[Any]) -> str:
    return ",".join(map(str, array.shape))


def _bytes(array: NDArray[Any]) -> str:
    return array.tobytes().hex() or "-"


def _step(word: str, line: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise Miss("a whole number as GLOBAL_STEP", short(line))
    return int(word)


def _center(words: list[str]) -> Arrays:
    center: dict[str, NDArray[Any]] = {}
    for word in words:
        name, array = _variable(word)
        if name in center:
            raise Miss("every variable once", f"{name!r} twice")
        center[name] = array
    return center


def _variable(word: str) -> tuple[str, NDArray[Any]]:
    try:
        name, type_, shape, data = word.split(":")
        array = np.frombuffer(b"" if data == "-" else bytes.fromhex(data), _DTYPES[type_])
        extents = [int(extent) for extent in shape.split(",") if shape]
        return bytes.fromhex(name).decode(), array.reshape(extents)
    except (ValueError, KeyError) as error:
        raise Miss("a VARIABLE, NAME:TYPE:SHAPE:BYTES", f"{short(word)} ({error})") from None
