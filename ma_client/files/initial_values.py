"""The chief's initial values from a file: an exported center, or the state dict of an earlier training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from modelaverage.errors import InvalidRequestError
from modelaverage.logs import event
from modelaverage.manifest import DTYPES, dtype_name

__all__ = ["InitialValuesFile", "read_initial_values"]

_Array = NDArray[Any]

_log = logging.getLogger("ma_client")
_NAMED = 4
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Functions that remove the prefixes that torch's wrappers add to names. The first one under which the file has all
# variables is used.
_VIEWS: tuple[Callable[[Sequence[str]], Sequence[str]], ...] = (
    lambda segments: segments,
    lambda segments: [segment for segment in segments if segment != "_orig_mod"],
    lambda segments: segments[1:] if segments[0] == "module" else segments,
    lambda segments: [s for s in (segments[1:] if segments[0] == "module" else segments) if s != "_orig_mod"],
    lambda segments: [segment for segment in segments if segment not in ("_orig_mod", "module")],
)


class InitialValuesFile(Protocol):
    """A file of named values."""

    def names(self) -> Sequence[str]:
        """The names of all its entries."""

    def what(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Element type (a name in `DTYPES` if it is one of those) and shape."""

    def read(self, name: str) -> _Array:
        """The values of an entry whose type is in `DTYPES`."""


def read_initial_values(
    variables: Mapping[str, _Array], path: str | Path, other_names: Mapping[str, Sequence[str]]
) -> dict[str, _Array]:
    """Returns the variables with the values in a file. Entries of the file that are not used are logged.

    The file's names may have the additions of torch's wrappers ("module.", "_orig_mod."), and its float types may
    differ from the center's.

    Args:
        variables: the variables of the center; only names, element types and shapes are used.
        path: path of a safetensors file or, if torch is installed, of a file written by `torch.save`.
        other_names: by variable, further names that the file may use for it (tied weights).

    Raises:
        InvalidRequestError: the file cannot be read, or lacks a variable, or has it with another shape, not as
            floating-point numbers, or with values too large for the center's type.
    """
    with _opened(Path(path)) as file:
        found, used = _find(variables, file.names(), other_names)
        missing = [name for name in variables if name not in found]
        if missing:
            raise _cannot(path, _what_is_missing(missing, file.names()))
        values, converted = dict[str, _Array](), list[str]()
        for name, like in variables.items():
            there = found[name]
            dtype, shape = file.what(there)
            if shape != like.shape:
                raise _cannot(path, f"variable {there!r} has shape {list(shape)} there and {list(like.shape)} here")
            values[name] = _converted(file, path, there, dtype, like)
            if dtype != dtype_name(like.dtype):
                converted.append(f"{name} ({dtype} to {dtype_name(like.dtype)})")
        unused = [name for name in file.names() if name not in used]
    if converted:
        _log.info(
            "%s: converted %s",
            path,
            _some(converted),
            extra=event("init_values_converted", path=str(path), variables=converted[:_NAMED],
                        variables_omitted=max(0, len(converted) - _NAMED)),
        )  # fmt: skip
    if unused:
        _log.warning(
            "%s has values that are not in the center; they are not used (what is not averaged stays as each worker "
            "made it): %s",
            path,
            _some(unused),
            extra=event("init_values_unused", path=str(path), variables=unused[:_NAMED],
                        variables_omitted=max(0, len(unused) - _NAMED)),
        )  # fmt: skip
    return values


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def names(self) -> Sequence[str]:
        return list(self._file.keys())

    def what(self, name: str) -> tuple[str, tuple[int, ...]]:
        there = self._file.get_slice(name)
        dtype = there.get_dtype()
        return _FLOATS.get(dtype, dtype), tuple(there.get_shape())

    def read(self, name: str) -> _Array:
        values: _Array = self._file.get_tensor(name)
        return values


@contextmanager
def _opened(path: Path) -> Iterator[InitialValuesFile]:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_ZIP))
    except OSError as error:
        raise _cannot(path, f"{error.strerror}") from None
    if not beginning:
        raise _cannot(path, "the file is empty")
    if beginning == _ZIP or (path.suffix in _TORCH_SUFFIXES and beginning.startswith(_PICKLE)):
        yield _torch_file(path)
        return
    try:
        opened = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise _cannot(
            path,
            f"it is not a safetensors file ({error}), nor one that torch.save wrote; `ps-server "
            "export` writes the former",
        ) from None
    with opened as file:
        try:
            yield _Safetensors(file)
        except (OSError, SafetensorError) as error:
            raise _cannot(path, f"{error}") from None


def _torch_file(path: Path) -> InitialValuesFile:
    try:
        from ma_client.files.torch_file import TorchFile  # not above: torch is an extra, and takes seconds to import
    except ModuleNotFoundError as error:
        raise _cannot(
            path, f"torch.save wrote it, and torch is needed to read it ({error}); install it, or save safetensors"
        ) from None
    try:
        return TorchFile(path)
    except ValueError as error:
        raise _cannot(path, f"{error}") from None


def _find(
    variables: Mapping[str, _Array], names: Sequence[str], other_names: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], set[str]]:
    """The file's names of the variables, and all of its names in use, for the name function that finds most
    variables."""
    best, taken = dict[str, str](), set[str]()
    for view in _VIEWS:
        there = dict[str, str]()
        for name in names:
            there.setdefault(".".join(view(name.split("."))), name)
        known = {name: [there[n] for n in (name, *other_names.get(name, ())) if n in there] for name in variables}
        found = {name: candidates[0] for name, candidates in known.items() if candidates}
        if len(found) > len(best):
            best, taken = found, {name for candidates in known.values() for name in candidates}
        if len(best) == len(variables):
            break
    return best, taken


def _converted(file: InitialValuesFile, path: str | Path, name: str, dtype: str, like: _Array) -> _Array:
    wanted = DTYPES[dtype_name(like.dtype)]
    if dtype not in DTYPES:
        scales = "; its values are right only with their scales: convert them first" if dtype.startswith("F8") else ""
        raise _cannot(
            path, f"variable {name!r} is {dtype} in the file, and {dtype_name(like.dtype)} in the model{scales}"
        )
    values = file.read(name)
    if values.dtype == wanted:
        return values
    with np.errstate(over="ignore"):
        converted = values.astype(wanted)
    lost = np.isfinite(values) & ~np.isfinite(converted)
    if lost.any():
        raise _cannot(
            path, f"variable {name!r} has the value {values[lost].flat[0]}, which does not fit {dtype_name(wanted)}"
        )
    return converted


def _what_is_missing(missing: Sequence[str], there: Sequence[str]) -> str:
    has = f"it has {_some(sorted(there))}" if there else "it has no variables"
    return f"it lacks {_some(missing)}; {has}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _cannot(path: str | Path, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"cannot initialize from {path}: {why}")
