"""The center variables, and their layout in the flat buffer and its fragments. Pure: no I/O, no state.

A manifest is the ordered list of center variables. The flat buffer holds their raw little-endian, row-major bytes in
that order, each variable at the next multiple of 8 bytes (the largest element), so that no element straddles two
fragments and every element is aligned. The .proto file says the same for authors of other clients.

When several servers share a model, each has its own manifest of the parts that it keeps. placement.py distributes the
variables and joins the parts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import Reason, refusal

__all__ = [
    "ALIGNMENT_BYTES",
    "DEFAULT_FRAGMENT_SIZE_BYTES",
    "DTYPES",
    "JOB_ID_BYTES",
    "MAX_DIMENSIONS",
    "MAX_FRAGMENTS",
    "MAX_FRAGMENT_SIZE_BYTES",
    "MAX_FROZEN_BYTES",
    "MAX_NAME_BYTES",
    "MAX_RUN",
    "MAX_SHARDS",
    "MAX_VARIABLES",
    "Manifest",
    "Part",
    "Piece",
    "RUN_SIZE_BYTES",
    "Shard",
    "Variable",
    "check_dimensions",
    "check_variable_count",
    "dtype_name",
    "first_difference",
]

ALIGNMENT_BYTES = 8
DEFAULT_FRAGMENT_SIZE_BYTES = 1 << 20
# Keeps every message well under gRPC's default limit of 4 MiB.
MAX_FRAGMENT_SIZE_BYTES = 2 << 20
# Longer messages are hardly more efficient (docs/decisions/0014).
RUN_SIZE_BYTES = 1 << 20
# Bounds the work that one message can cause before the server handles others.
MAX_RUN = 64
MAX_NAME_BYTES = 1024
# The limit of numpy 1.
MAX_DIMENSIONS = 32
_PADDING = memoryview(bytes(ALIGNMENT_BYTES))
_MAX_MODEL_BYTES = 2**63 - 1
# Bounds the memory that a header alone can make a server allocate; 512 GiB at the largest fragment size.
MAX_FRAGMENTS = 1 << 18
MAX_FROZEN_BYTES = 512 << 10
MAX_SHARDS = 4096
# Bounds the work that a header alone can cause.
MAX_VARIABLES = 1 << 16
JOB_ID_BYTES = 16
# How many variables the id turns into text at once, so that other threads wait only briefly.
_VARIABLES_AT_ONCE = 1000

# The element types that can be averaged, by name. numpy has no bfloat16; ml_dtypes, which JAX uses too, adds it.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[np.generic]) -> str:
    """The name of an element type, in either byte order, as in DTYPES; numpy's name for types that cannot be
    averaged."""
    return _NAMES.get(dtype.newbyteorder("<")) or str(dtype)


@dataclass(frozen=True, slots=True)
class Part:
    """The position of a shard's variable in the whole model.

    Args:
        variable: index of the whole variable in the whole model's manifest.
        start: index of its first element in the flattened whole variable.
        shape: the shape of the whole variable.
    """

    variable: int
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Identifies the part of a job's model that a server keeps.

    Args:
        index: from 0, in the order of the servers' addresses.
        count: the number of shards, at most 4096.
        job_id: 16 random bytes, the same on all shards of a job.

    Raises:
        InvalidRequestError: MANIFEST_INVALID.
    """

    index: int
    count: int
    job_id: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAX_SHARDS:
            raise _invalid(f"there is no shard {self.index} of {self.count}; at most {MAX_SHARDS} are possible")
        if len(self.job_id) != JOB_ID_BYTES:
            raise _invalid(f"the job id of a shard has {len(self.job_id)} bytes; give {JOB_ID_BYTES} random ones")

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count} of job {self.job_id.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class Variable:
    """One center variable, or a shard's part of it.

    Args:
        name: unique in its manifest, 1 to 1024 bytes.
        dtype: a key of DTYPES.
        shape: extents, outermost first; empty for a scalar. For a part: the whole shape if the part has all elements,
            otherwise the number of its elements.
        part: present only in a shard's manifest: the position in the whole model.

    Raises:
        InvalidRequestError: MANIFEST_INVALID, naming the variable and what is wrong with it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part | None = None

    def __post_init__(self) -> None:
        name_bytes = len(self.name.encode("utf-8", "surrogatepass"))
        if not 1 <= name_bytes <= MAX_NAME_BYTES:
            raise _invalid(f"a variable's name has {name_bytes} bytes; give 1 to {MAX_NAME_BYTES}")
        if self.dtype not in DTYPES:
            raise _invalid(f"variable {self.name!r} has dtype {self.dtype}; only {', '.join(DTYPES)} can be averaged")
        check_dimensions(self.name, len(self.shape))
        if self.shape and min(self.shape) < 0:
            raise _invalid(f"variable {self.name!r} has a negative extent, {min(self.shape)} in shape {self.shape}")
        # A zero makes the variable empty, but the other extents must still be valid.
        if math.prod([extent or 1 for extent in self.shape]) * DTYPES[self.dtype].itemsize > _MAX_MODEL_BYTES:
            raise _invalid(
                f"variable {self.name!r} with shape {self.shape} is too large: its size in bytes does not fit 63 bits"
            )
        if self.part is not None:
            self._check_part(self.part)

    def _check_part(self, part: Part) -> None:
        Variable(self.name, self.dtype, part.shape)
        if part.shape == self.shape and part.start == 0:
            return
        if len(self.shape) != 1 or not 0 <= part.start < part.start + self.size <= math.prod(part.shape):
            raise _invalid(
                f"variable {self.name!r} of shape {self.shape} is not a part of one of shape {part.shape} "
                f"from element {part.start} on"
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size without padding."""
        return self.size * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        if self.part is None or self.part.shape == self.shape:
            return f"{self.dtype}{list(self.shape)}"
        start, whole = self.part.start, list(self.part.shape)
        return f"elements {start} to {start + self.size - 1} of {self.dtype}{whole}"


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one variable that lies in one fragment; never empty.

    Args:
        variable: index of the variable in the manifest.
        start: its first element in the flattened variable.
        count: number of elements.
        offset_bytes: where it starts in the fragment.
    """

    variable: int
    start: int
    count: int
    offset_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The ordered list of center variables and the size of a fragment.

    Args:
        variables: with distinct names; from 1 to 65,536, but a shard may have none.
        fragment_size_bytes: a multiple of 8 from 8 to 2 MiB.
        shard: the shard of a larger model that this is; None: it is the whole model.
        frozen_digests: what the chief says of parameters that are not trained; at most 512 KiB. Only workers read it.

    Raises:
        InvalidRequestError: MANIFEST_INVALID, naming the rule that is broken.
    """

    variables: tuple[Variable, ...]
    fragment_size_bytes: int = DEFAULT_FRAGMENT_SIZE_BYTES
    shard: Shard | None = None
    frozen_digests: bytes = b""

    def __post_init__(self) -> None:
        check_variable_count(len(self.variables))
        self._check_parts()
        if not self.variables and self.shard is None:
            raise _invalid("the manifest has no variables; there is nothing to average")
        seen: set[str] = set()
        for variable in self.variables:
            if variable.name in seen:
                raise _invalid(f"the manifest has variable {variable.name!r} twice")
            seen.add(variable.name)
        size_bytes = self.fragment_size_bytes
        if size_bytes % ALIGNMENT_BYTES or not ALIGNMENT_BYTES <= size_bytes <= MAX_FRAGMENT_SIZE_BYTES:
            raise _invalid(
                f"fragment_size_bytes {size_bytes} is not a multiple of {ALIGNMENT_BYTES} "
                f"from {ALIGNMENT_BYTES} to {MAX_FRAGMENT_SIZE_BYTES}"
            )
        if len(self.frozen_digests) > MAX_FROZEN_BYTES:
            raise _invalid(f"frozen_digests has {len(self.frozen_digests)} bytes; at most {MAX_FROZEN_BYTES} may come")
        if self.fragment_count > MAX_FRAGMENTS:
            raise _invalid(
                f"a model of {self.size_bytes} bytes has {self.fragment_count} fragments of {size_bytes} bytes; "
                f"at most {MAX_FRAGMENTS} are possible: choose a larger fragment_size_bytes"
            )

    def _check_parts(self) -> None:
        last = -1
        for variable in self.variables:
            if (variable.part is None) != (self.shard is None):
                which = "a part, but the manifest has no" if self.shard is None else "no part, but the manifest has a"
                raise _invalid(f"variable {variable.name!r} has {which} shard; give both or neither")
            if variable.part is not None:
                if variable.part.variable <= last:
                    raise _invalid(f"variable {variable.name!r} is number {variable.part.variable}, after {last}")
                last = variable.part.variable

    @cached_property
    def id(self) -> str:
        """An id of the variables, their order and the fragment size: equal manifests have equal ids in every
        process."""
        # The JSON of [fragment_size_bytes, [[name, dtype, shape], ..., [index, count, job id], frozen_digests]], piece
        # by piece; what there is not is left out.
        digest, between = hashlib.sha256(f"[{self.fragment_size_bytes}, [".encode()), b""
        for start in range(0, len(self.variables), _VARIABLES_AT_ONCE):
            some = [[v.name, v.dtype, v.shape] for v in self.variables[start : start + _VARIABLES_AT_ONCE]]
            digest.update(between + json.dumps(some)[1:-1].encode())
            between = b", "
        if self.shard is not None:
            shard = [self.shard.index, self.shard.count, self.shard.job_id.hex()]
            digest.update(between + json.dumps(shard).encode())
        if self.frozen_digests:
            digest.update(b', "' + self.frozen_digests.hex().encode() + b'"')
        digest.update(b"]]")
        return digest.hexdigest()[:32]

    @cached_property
    def offsets_bytes(self) -> tuple[int, ...]:
        """Where each variable starts in the flat buffer."""
        offsets, end = [], 0
        for variable in self.variables:
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            offsets.append(start)
            end = start + variable.size_bytes
        return tuple(offsets)

    @cached_property
    def size_bytes(self) -> int:
        """Size of all variables, without padding."""
        return sum(variable.size_bytes for variable in self.variables)

    @cached_property
    def buffer_size_bytes(self) -> int:
        """Size of the flat buffer: up to the last byte of the last variable that is not empty."""
        ends = (o + v.size_bytes for o, v in zip(self.offsets_bytes, self.variables, strict=True) if v.size_bytes)
        return max(ends, default=0)

    @cached_property
    def fragment_count(self) -> int:
        """Number of fragments; 0 if every variable is empty."""
        return -(-self.buffer_size_bytes // self.fragment_size_bytes)

    def fragment_bounds(self, index: int) -> tuple[int, int]:
        """First byte and end of a fragment in the flat buffer."""
        start = index * self.fragment_size_bytes
        return start, min(start + self.fragment_size_bytes, self.buffer_size_bytes)

    def run_end(self, first: int, size_bytes: int) -> int | None:
        """The index after the last of the consecutive fragments, from ``first`` on, that have ``size_bytes`` bytes
        together; None if no number of whole fragments has that size."""
        end = first + -(-size_bytes // self.fragment_size_bytes)
        fits = size_bytes <= MAX_FRAGMENT_SIZE_BYTES and end - first <= MAX_RUN
        if not first < end <= self.fragment_count or not fits:
            return None
        start, stop = self.fragment_bounds(first)[0], self.fragment_bounds(end - 1)[1]
        return end if size_bytes == stop - start else None

    @cached_property
    def longest_run(self) -> int:
        """The most fragments to put into one message."""
        return max(1, min(RUN_SIZE_BYTES // self.fragment_size_bytes, MAX_RUN))

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For every fragment, its pieces in order."""
        fragments: list[list[Piece]] = [[] for _ in range(self.fragment_count)]
        for number, (variable, offset) in enumerate(zip(self.variables, self.offsets_bytes, strict=True)):
            for index, piece in self._cut(number, variable, offset):
                fragments[index].append(piece)
        return tuple(tuple(pieces) for pieces in fragments)

    def _cut(self, number: int, variable: Variable, offset_bytes: int) -> Iterator[tuple[int, Piece]]:
        itemsize = DTYPES[variable.dtype].itemsize
        start = 0
        while start < variable.size:
            index, within = divmod(offset_bytes + start * itemsize, self.fragment_size_bytes)
            count = min(variable.size - start, (self.fragment_size_bytes - within) // itemsize)
            yield index, Piece(number, start, count, within)
            start += count

    def piece_bounds(self, index: int) -> list[tuple[int, int]]:
        """First byte and end in the flat buffer of each piece of fragment ``index``."""
        bounds: list[tuple[int, int]] = []
        start = self.fragment_bounds(index)[0]
        for piece in self.pieces[index]:
            begin = start + piece.offset_bytes
            bounds.append((begin, begin + piece.count * DTYPES[self.variables[piece.variable].dtype].itemsize))
        return bounds

    def piece_bytes(self, index: int, values: Sequence[memoryview]) -> list[memoryview]:
        """The bytes of each piece of fragment ``index``; views.

        Args:
            index: the fragment.
            values: the bytes of each variable, in manifest order.
        """
        pieces: list[memoryview] = []
        for piece in self.pieces[index]:
            itemsize = DTYPES[self.variables[piece.variable].dtype].itemsize
            pieces.append(values[piece.variable][piece.start * itemsize : (piece.start + piece.count) * itemsize])
        return pieces

    def piece_arrays(self, index: int, flat: NDArray[np.uint8]) -> list[NDArray[np.generic]]:
        """The values of each piece of fragment ``index`` in a flat buffer (uint8, `buffer_size_bytes`); views,
        one-dimensional."""
        return [
            flat[begin:end].view(DTYPES[self.variables[piece.variable].dtype])
            for piece, (begin, end) in zip(self.pieces[index], self.piece_bounds(index), strict=True)
        ]

    def padded(self, index: int, pieces: Sequence[memoryview]) -> list[memoryview]:
        """What fragment ``index`` consists of, in order: the bytes of its pieces, and padding."""
        parts: list[memoryview] = []
        at = 0
        for piece, data in zip(self.pieces[index], pieces, strict=True):
            if piece.offset_bytes > at:
                parts.append(_PADDING[: piece.offset_bytes - at])
            parts.append(data)
            at = piece.offset_bytes + len(data)
        start, end = self.fragment_bounds(index)
        if at < end - start:
            parts.append(_PADDING[: end - start - at])
        return parts

    def fragment_parts(self, index: int, values: Sequence[memoryview]) -> list[memoryview]:
        """What fragment ``index`` consists of, in order: views of the variables' bytes (as in `piece_bytes`), and
        padding."""
        return self.padded(index, self.piece_bytes(index, values))

    def arrays(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
        """The variables in a flat buffer (uint8, `buffer_size_bytes` long), by name; views, nothing is copied."""
        return {
            variable.name: buffer[offset : offset + variable.size_bytes]
            .view(DTYPES[variable.dtype])
            .reshape(variable.shape)
            for variable, offset in zip(self.variables, self.offsets_bytes, strict=True)
        }


def check_variable_count(count: int) -> None:
    """Raises InvalidRequestError (MANIFEST_INVALID) if a manifest cannot have ``count`` variables."""
    if count > MAX_VARIABLES:
        raise _invalid(
            f"the manifest has {count} variables; at most {MAX_VARIABLES} are possible: "
            "put several parameters into one variable"
        )


def check_dimensions(name: str, count: int) -> None:
    """Raises InvalidRequestError (MANIFEST_INVALID) if no variable can have ``count`` dimensions."""
    if count > MAX_DIMENSIONS:
        raise _invalid(f"variable {name!r} has {count} dimensions; at most {MAX_DIMENSIONS} are possible")


def first_difference(ours: Sequence[Variable], theirs: Sequence[Variable], whose: str, other: str) -> str | None:
    """Names the first way in which two lists of variables differ, or None. ``whose`` and ``other`` name the sides."""
    for index, (mine, their) in enumerate(zip(ours, theirs, strict=False)):
        if mine.name != their.name:
            return _different_names(index, ours, theirs, whose, other)
        if mine != their:
            return f"variable {mine.name!r} is {mine} {whose} but {their} {other}"
    if len(ours) == len(theirs):
        return None
    longer, side = (ours, whose) if len(ours) > len(theirs) else (theirs, other)
    return f"variable {longer[min(len(ours), len(theirs))].name!r} exists only {side}"


def _different_names(index: int, ours: Sequence[Variable], theirs: Sequence[Variable], whose: str, other: str) -> str:
    """How the names differ, in two lists that differ first at ``index``, in a name."""
    our_names, their_names = ([variable.name for variable in variables] for variables in (ours, theirs))
    ours_known, theirs_known = set(our_names), set(their_names)
    only_here = next((name for name in our_names if name not in theirs_known), None)
    only_there = next((name for name in their_names if name not in ours_known), None)
    mine, their = our_names[index], their_names[index]
    if (mine, their) == (only_here, only_there):
        return f"variable {index} is {mine!r} {whose} but {their!r} {other}"
    if only_there is not None:
        more = "" if only_here is None else f", and {only_here!r} only {whose}"
        return f"variable {only_there!r} exists only {other}{more}"
    if only_here is not None:
        return f"variable {only_here!r} exists only {whose}"
    return f"variable {index} is {mine!r} {whose} but {their!r} {other} (the same names in another order)"


def _invalid(message: str) -> Exception:
    return refusal(Reason.MANIFEST_INVALID, message)
