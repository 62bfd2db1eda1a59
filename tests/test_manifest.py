"""The manifest: how variables lie in the flat buffer and its fragments, against a byte-by-byte oracle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelaverage.errors import InvalidRequestError, Reason
from modelaverage.manifest import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_FRAGMENT_SIZE_BYTES,
    MAX_FRAGMENTS,
    MAX_FROZEN_BYTES,
    MAX_NAME_BYTES,
    MAX_RUN,
    MAX_VARIABLES,
    Manifest,
    Part,
    Shard,
    Variable,
    dtype_name,
    first_difference,
)
from tests.strategies import fast, manifests

ONE = (Variable("v", "float32", (1,)),)


def layout(manifest: Manifest) -> list[tuple[int, int] | None]:
    """The oracle: for every byte of the flat buffer, which byte of which variable it is; None is padding."""
    flat: list[tuple[int, int] | None] = []
    for number, variable in enumerate(manifest.variables):
        while len(flat) % 8:
            flat.append(None)
        elements = 1
        for extent in variable.shape:
            elements *= extent
        size = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[variable.dtype]
        flat += [(number, byte) for byte in range(elements * size)]
    while flat and flat[-1] is None:
        flat.pop()
    return flat


def values_of(manifest: Manifest) -> list[bytes]:
    """Different bytes at every place of every variable; no zeros, so that padding shows."""
    return [
        bytes((number * 53 + byte) % 255 + 1 for byte in range(variable.size_bytes))
        for number, variable in enumerate(manifest.variables)
    ]


def flat_bytes(manifest: Manifest) -> bytes:
    values = values_of(manifest)
    return bytes(0 if place is None else values[place[0]][place[1]] for place in layout(manifest))


@fast
@given(manifests())
def test_the_flat_buffer_is_what_the_protocol_says(manifest: Manifest) -> None:
    flat = layout(manifest)
    assert manifest.buffer_size_bytes == len(flat)
    assert manifest.size_bytes == sum(place is not None for place in flat)
    for number, offset in enumerate(manifest.offsets_bytes):
        assert offset % 8 == 0
        if manifest.variables[number].size:
            assert flat[offset] == (number, 0)


@fast
@given(manifests())
def test_fragments_cover_the_flat_buffer_and_all_but_the_last_are_full(manifest: Manifest) -> None:
    bounds = [manifest.fragment_bounds(index) for index in range(manifest.fragment_count)]
    assert [byte for start, end in bounds for byte in range(start, end)] == list(range(manifest.buffer_size_bytes))
    assert all(end - start == manifest.fragment_size_bytes for start, end in bounds[:-1])
    assert all(end > start for start, end in bounds)


@fast
@given(manifests())
def test_every_element_is_in_exactly_one_piece_in_order_and_whole(manifest: Manifest) -> None:
    flat = layout(manifest)
    elements = []
    assert len(manifest.pieces) == manifest.fragment_count
    for index, pieces in enumerate(manifest.pieces):
        start, end = manifest.fragment_bounds(index)
        for piece in pieces:
            size = DTYPES[manifest.variables[piece.variable].dtype].itemsize
            assert piece.count > 0
            assert start + piece.offset_bytes + piece.count * size <= end
            for element in range(piece.start, piece.start + piece.count):
                at = start + piece.offset_bytes + (element - piece.start) * size
                assert flat[at : at + size] == [(piece.variable, element * size + byte) for byte in range(size)]
                elements.append((piece.variable, element))
    assert elements == [(number, e) for number, v in enumerate(manifest.variables) for e in range(v.size)]


@fast
@given(manifests())
def test_fragment_parts_joined_are_the_flat_buffer(manifest: Manifest) -> None:
    views = [memoryview(value) for value in values_of(manifest)]
    joined = b"".join(b"".join(manifest.fragment_parts(i, views)) for i in range(manifest.fragment_count))
    assert joined == flat_bytes(manifest)


@fast
@given(manifests(min_elements=1))
def test_fragment_parts_are_views_of_the_variables(manifest: Manifest) -> None:
    values = [bytearray(value) for value in values_of(manifest)]
    views = [memoryview(value) for value in values]
    parts = [part for index in range(manifest.fragment_count) for part in manifest.fragment_parts(index, views)]
    for value in values:
        value[:] = bytes(len(value))
    assert not any(b"".join(parts))


@fast
@given(manifests())
def test_arrays_are_views_with_the_dtypes_and_shapes_of_the_variables(manifest: Manifest) -> None:
    buffer = np.frombuffer(bytearray(flat_bytes(manifest)), np.uint8)
    arrays = manifest.arrays(buffer)
    assert list(arrays) == [variable.name for variable in manifest.variables]
    for variable, value in zip(manifest.variables, values_of(manifest), strict=True):
        array = arrays[variable.name]
        assert (dtype_name(array.dtype), array.shape) == (variable.dtype, variable.shape)
        assert array.tobytes() == value
        assert array.size == 0 or np.shares_memory(array, buffer)
        array[...] = np.zeros((), array.dtype)
    assert not buffer.any(), "a write to an array did not reach the buffer"


def test_a_model_whose_variables_are_all_empty_has_no_fragments() -> None:
    manifest = Manifest((Variable("a", "float64", (0,)), Variable("b", "float16", (3, 0))))
    assert (manifest.size_bytes, manifest.buffer_size_bytes, manifest.fragment_count) == (0, 0, 0)
    assert manifest.pieces == ()
    assert manifest.arrays(np.zeros(0, np.uint8))["b"].shape == (3, 0)


def test_an_empty_variable_at_the_end_adds_no_padding() -> None:
    manifest = Manifest((Variable("a", "float16", ()), Variable("b", "float64", (0,))), 8)
    assert (manifest.buffer_size_bytes, manifest.fragment_count) == (2, 1)
    assert manifest.fragment_parts(0, [memoryview(b"xy"), memoryview(b"")]) == [b"xy"]


def test_a_scalar_is_one_element() -> None:
    variable = Variable("s", "float32", ())
    assert (variable.size, variable.size_bytes) == (1, 4)
    assert Manifest((variable,)).arrays(np.zeros(4, np.uint8))["s"].shape == ()


# Identity.


@fast
@given(manifests(), manifests())
def test_ids_are_equal_if_and_only_if_the_manifests_are(one: Manifest, other: Manifest) -> None:
    assert (one.id == other.id) == (one == other)
    assert Manifest(tuple(one.variables), one.fragment_size_bytes, frozen_digests=one.frozen_digests).id == one.id


@pytest.mark.parametrize(
    "other",
    [
        Manifest((Variable("a", "float32", (2, 3)), Variable("b", "float32", (1,))), 16),
        Manifest((Variable("b", "float32", (1,)), Variable("a", "float32", (2, 3))), 8),
        Manifest((Variable("a", "float32", (3, 2)), Variable("b", "float32", (1,))), 8),
        Manifest((Variable("a", "float64", (2, 3)), Variable("b", "float32", (1,))), 8),
        Manifest((Variable("a", "float32", (2, 3)), Variable("c", "float32", (1,))), 8),
        Manifest((Variable("a", "float32", (2, 3)), Variable("b", "float32", ())), 8),
        Manifest((Variable("a", "float32", (2, 3)),), 8),
        Manifest((Variable('a","float32",[2,3]],["b', "float32", (1,)),), 8),
        Manifest((Variable("a", "float32", (2, 3)), Variable("b", "float32", (1,))), 8, frozen_digests=b"digests"),
    ],
)
def test_any_difference_makes_another_id(other: Manifest) -> None:
    manifest = Manifest((Variable("a", "float32", (2, 3)), Variable("b", "float32", (1,))), 8)
    assert manifest.id != other.id


def test_an_id_is_the_same_in_every_process_and_version() -> None:
    # Workers and servers of different releases compare it: a change of it changes the protocol.
    assert Manifest((Variable("w", "float32", (2, 3)),), 64).id == "6f46bd0e7da5d62b1723a6b042570114"
    content = [64, [["w", "float32", [2, 3]], [0, 1, "00" * 16], "1f"]]
    part = Part(0, 0, (2, 3))
    said = Manifest((Variable("w", "float32", (2, 3), part),), 64, Shard(0, 1, bytes(16)), b"\x1f")
    assert said.id == hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@pytest.mark.parametrize("shard", [None, Shard(1, 3, bytes(range(16)))])
def test_an_id_is_the_same_however_many_variables_there_are(shard: Shard | None) -> None:
    # Computed by the rule, which joins all of them into one text.
    for count in (1, 999, 1000, 1001, 2500):
        names = [f'v"{number}' for number in range(count)]
        parts = [None if shard is None else Part(number, 0, (2, 3)) for number in range(count)]
        variables = tuple(Variable(name, "float16", (2, 3), part) for name, part in zip(names, parts, strict=True))
        content: list[object] = [[name, "float16", [2, 3]] for name in names]
        content += [] if shard is None else [[1, 3, shard.job_id.hex()]]
        expected = hashlib.sha256(json.dumps([64, content]).encode()).hexdigest()[:32]
        assert Manifest(variables, 64, shard).id == expected
    assert Manifest((), 64, Shard(0, 1, bytes(16))).id != Manifest((), 64, Shard(0, 2, bytes(16))).id


# Differences.


def difference(ours: list[Variable], theirs: list[Variable]) -> str | None:
    return first_difference(ours, theirs, "here", "there")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([("a", (2, 3)), ("b", (4,))], None),
        ([("a", (2, 3)), ("b", (5,))], "variable 'b' is float32[4] here but float32[5] there"),
        ([("a", (6,)), ("b", (5,))], "variable 'a' is float32[2, 3] here but float32[6] there"),
        ([("b", (4,)), ("a", (2, 3))], "variable 0 is 'a' here but 'b' there (the same names in another order)"),
        ([("x", (2, 3)), ("b", (4,))], "variable 0 is 'a' here but 'x' there"),
        ([("b", (4,))], "variable 'a' exists only here"),
        ([("c", ()), ("a", (2, 3)), ("b", (4,))], "variable 'c' exists only there"),
        ([("b", (4,)), ("c", ())], "variable 'c' exists only there, and 'a' only here"),
        ([("a", (2, 3))], "variable 'b' exists only here"),
        ([("a", (2, 3)), ("b", (4,)), ("c", ())], "variable 'c' exists only there"),
    ],
)
def test_the_first_difference_names_the_variable_and_both_sides(
    theirs: list[tuple[str, tuple[int, ...]]], said: str | None
) -> None:
    ours = [Variable("a", "float32", (2, 3)), Variable("b", "float32", (4,))]
    assert difference(ours, [Variable(name, "float32", shape) for name, shape in theirs]) == said


def test_a_difference_in_dtype_names_both() -> None:
    said = difference([Variable("a", "float32", ())], [Variable("a", "bfloat16", ())])
    assert said == "variable 'a' is float32[] here but bfloat16[] there"


@fast
@given(manifests(), manifests())
def test_there_is_a_difference_if_and_only_if_the_variables_differ(one: Manifest, other: Manifest) -> None:
    assert (first_difference(one.variables, other.variables, "", "") is None) == (one.variables == other.variables)


# What is refused.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Manifest(()), "the manifest has no variables"),
        (lambda: Manifest(ONE * 2), "variable 'v' twice"),
        (lambda: Variable("v", "float32", (2, -3)), "variable 'v' has a negative extent, -3 in shape (2, -3)"),
        (lambda: Variable("v", "float32", (0, -1)), "negative extent, -1"),
        (lambda: Variable("v", "float32", (2**61,)), "variable 'v' with shape (2305843009213693952,) is too large"),
        (lambda: Variable("v", "float64", (2**30, 2**30)), "does not fit"),
        (lambda: Variable("v", "float32", (0, 2**62, 2**62)), "does not fit"),
        (
            lambda: Variable("v", "float32", (1,) * (MAX_DIMENSIONS + 1)),
            "variable 'v' has 33 dimensions; at most 32 are possible",
        ),
        (lambda: Variable("v", "float32", (2**62,) * 100_000), "variable 'v' has 100000 dimensions"),
        (lambda: Variable("v", "int64", (1,)), "variable 'v' has dtype int64; only float32"),
        (lambda: Variable("v", "", (1,)), "variable 'v' has dtype "),
        (lambda: Variable("", "float32", (1,)), "name has 0 bytes"),
        (lambda: Variable("x" * (MAX_NAME_BYTES + 1), "float32", (1,)), "name has 1025 bytes"),
        (lambda: Variable("é" * 513, "float32", (1,)), "name has 1026 bytes"),
        (lambda: Manifest(ONE, frozen_digests=bytes(MAX_FROZEN_BYTES + 1)), "frozen_digests has 524289 bytes; at most"),
        (lambda: Manifest(ONE, 0), "fragment_size_bytes 0 is not a multiple of 8"),
        (lambda: Manifest(ONE, 4), "fragment_size_bytes 4 "),
        (lambda: Manifest(ONE, 12), "fragment_size_bytes 12 "),
        (lambda: Manifest(ONE, -8), "fragment_size_bytes -8 "),
        (lambda: Manifest(ONE, MAX_FRAGMENT_SIZE_BYTES + 8), "fragment_size_bytes 2097160 "),
        (
            lambda: Manifest((Variable("v", "float64", (MAX_FRAGMENTS + 1,)),), 8),
            f"{MAX_FRAGMENTS + 1} fragments of 8 bytes",
        ),
        (
            lambda: Manifest(tuple(Variable(f"v{n}", "float16", (2**61,)) for n in range(4))),
            "a model of 18446744073709551616 bytes has ",
        ),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_and_the_rule_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(said)) as error:
        make()
    assert error.value.reason is Reason.MANIFEST_INVALID
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1,) * MAX_DIMENSIONS, (0,) * MAX_DIMENSIONS, (0, 2**61 - 1), (2**61 - 1, 0)])
def test_numpy_can_hold_whatever_shape_is_accepted(shape: tuple[int, ...]) -> None:
    manifest = Manifest((Variable("v", "float32", shape),))
    assert manifest.arrays(np.zeros(manifest.buffer_size_bytes, np.uint8))["v"].shape == shape


@pytest.mark.parametrize("fragment_size_bytes", [8, 16, MAX_FRAGMENT_SIZE_BYTES])
def test_the_limits_themselves_are_accepted(fragment_size_bytes: int) -> None:
    Manifest((Variable("x" * MAX_NAME_BYTES, "float32", (1,)),), fragment_size_bytes)


def test_the_largest_count_of_variables_is_accepted_and_one_more_is_refused() -> None:
    variables = tuple(Variable(f"v{number}", "float32", ()) for number in range(MAX_VARIABLES + 1))
    assert len(Manifest(variables[:-1]).offsets_bytes) == MAX_VARIABLES
    with pytest.raises(InvalidRequestError, match=f"the manifest has {MAX_VARIABLES + 1} variables; at most") as error:
        Manifest(variables)
    assert error.value.reason is Reason.MANIFEST_INVALID


def test_the_largest_count_of_fragments_is_accepted() -> None:
    assert Manifest((Variable("v", "float64", (MAX_FRAGMENTS,)),), 8).fragment_count == MAX_FRAGMENTS


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtypes_have_the_names_of_the_protocol(name: str) -> None:
    assert dtype_name(DTYPES[name]) == name
    assert DTYPES[name].itemsize == {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[name]


def test_a_dtype_has_the_same_name_in_either_byte_order() -> None:
    for code, name in (("f2", "float16"), ("f4", "float32"), ("f8", "float64")):
        assert dtype_name(np.dtype("<" + code)) == dtype_name(np.dtype(">" + code)) == name


@pytest.mark.parametrize("name", ["int8", "int64", "uint32", "bool", "complex64", "str"])
def test_a_dtype_that_cannot_be_averaged_keeps_numpys_name(name: str) -> None:
    assert dtype_name(np.dtype(name)) not in DTYPES


# Runs: several fragments in one message.


@given(manifests(), st.data())
def test_only_whole_consecutive_fragments_are_a_run(manifest: Manifest, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, manifest.fragment_count))
    size_bytes = data.draw(st.integers(0, manifest.buffer_size_bytes + 9))
    ends = [
        end
        for end in range(first + 1, manifest.fragment_count + 1)
        if sum(stop - start for start, stop in map(manifest.fragment_bounds, range(first, end))) == size_bytes
        and end - first <= MAX_RUN
    ]
    assert manifest.run_end(first, size_bytes) == (ends[0] if ends else None)
