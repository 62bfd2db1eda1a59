"""The codecs that round changes: how exact they are, what they do with every kind of float, and their bytes.

`Oracle` writes int8 and int4 once more, one element at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelaverage.codecs import Codec
from modelaverage.codecs.bfloat16 import BFLOAT16
from modelaverage.codecs.int4 import INT4
from modelaverage.codecs.int8 import INT8
from modelaverage.errors import ProtocolError, Reason
from modelaverage.manifest import DTYPES, Manifest, Variable
from tests.centers import SEEDS
from tests.strategies import fast

CODED = {
    "bfloat16": ("float32",),
    "int8": ("float32", "bfloat16", "float16"),
    "int4": ("float32", "bfloat16", "float16"),
}
LEVELS = {"int8": 127, "int4": 7}
LARGEST = {"float32": 2.0**128 - 2.0**104, "bfloat16": 2.0**128 - 2.0**120, "float16": 65504.0}
LEAST_NORMAL = np.float32(2.0**-126)

Array = NDArray[Any]

changes = pytest.mark.parametrize("codec", [BFLOAT16, INT8, INT4], ids=lambda codec: codec.name)
blocks = pytest.mark.parametrize("codec", [INT8, INT4], ids=lambda codec: codec.name)
every_dtype = pytest.mark.parametrize(
    ("codec", "dtype"),
    [(codec, dtype) for codec in (BFLOAT16, INT8, INT4) for dtype in CODED[codec.name]],
    ids=lambda value: getattr(value, "name", value),
)


@dataclass
class Piece:
    """The last piece of a large variable: any number of elements that is coded; alone in its fragment."""

    codec: Codec
    dtype: str
    count: int

    def __post_init__(self) -> None:
        fragment_size_bytes = 16384
        self.elements = fragment_size_bytes // DTYPES[self.dtype].itemsize
        assert self.count <= self.elements
        self.manifest = Manifest((Variable("v", self.dtype, (self.elements + self.count,)),), fragment_size_bytes)

    def encode(self, values: Array, base: Array) -> bytes:
        return b"".join(self.codec.encode(self.manifest, 1, [values], [base]))

    def decode(self, data: bytes, base: Array, shift: int = 0) -> Array:
        """In the variable's dtype; decoded from bytes at a shifted address, and in place over the base."""
        moved = memoryview(bytes(shift) + data)[shift:]
        (values,) = self.codec.decode(self.manifest, 1, moved, [base])
        flat = np.zeros(self.manifest.buffer_size_bytes, np.uint8)
        (room,) = self.manifest.piece_arrays(1, flat)
        room[...] = base
        self.codec.decode_into(self.manifest, flat, 1, moved, flat)
        with np.errstate(all="ignore"):
            decoded = values.astype(DTYPES[self.dtype])
        assert decoded.tobytes() == room.tobytes()
        return decoded

    def there_and_back(self, values: Array, base: Array) -> Array:
        return self.decode(self.encode(values, base), base)


def counts(codec: Codec) -> st.SearchStrategy[int]:
    """Lengths of float32 and 16-bit pieces that are coded; whole blocks and others."""
    return st.integers(133 if codec is not BFLOAT16 else 1, 4096) | st.sampled_from([256, 384, 2048, 4096])


def normal(dtype: str, count: int, seed: int, scale: float = 1.0) -> Array:
    values = np.random.default_rng(seed).normal(0.0, scale, count)
    return values.astype(np.float32).astype(DTYPES[dtype])


def any_bits(dtype: str, count: int, seed: int) -> Array:
    """Every kind of float: in random bits, with many special ones."""
    chance = np.random.default_rng(seed)
    values = np.frombuffer(chance.bytes(count * DTYPES[dtype].itemsize), DTYPES[dtype]).copy()
    large = LARGEST[dtype]
    some = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, large, -large, 1e-5, -1e-41, 1.0], np.float32)
    few = chance.random(count) < chance.choice([0.0, 0.01, 0.5])
    values[few] = chance.choice(some, int(few.sum())).astype(DTYPES[dtype])
    return np.asarray(values)


def wide(values: Array) -> NDArray[np.float64]:
    """As float64."""
    with np.errstate(invalid="ignore"):  # A signaling NaN.
        widened: NDArray[np.float64] = values.astype(np.float32).astype(np.float64)
    return widened


def in_blocks(values: Array) -> Array:
    """Shape (n, 128), filled up with zeros."""
    rows = np.zeros((-(-len(values) // 128), 128), values.dtype)
    rows.reshape(-1)[: len(values)] = values
    return rows


def bound(codec: Codec, dtype: str, values: Array, base: Array) -> Array:
    """The largest error of each element of an ordinary piece, in float64."""
    change = wide(base) - wide(values)
    if codec is BFLOAT16:
        error = np.abs(change) * 2.0**-8 + 2.0**-134
    else:
        scale = np.abs(in_blocks(change)).max(axis=1, keepdims=True) / LEVELS[codec.name]
        # A block of tiny changes has no scale.
        scale = np.where(scale < LEAST_NORMAL * 1.001, 2 * LEVELS[codec.name] * LEAST_NORMAL, scale)
        error = np.broadcast_to(scale / 2, (len(scale), 128)).reshape(-1)[: len(values)]
    # float32 arithmetic: the difference, the scale, the product, the sum; then the rounding to the variable's dtype.
    arithmetic = (np.abs(wide(base)) + np.abs(wide(values)) + np.abs(change) + error * 2 * 127) * 2.0**-22 + 2.0**-148
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    tiny = 2.0**-24 if dtype == "float16" else 2.0**-133
    return np.asarray(error + arithmetic + rounding * (np.abs(wide(values)) + error) + tiny * (rounding > 0))


# How exact.


@every_dtype
@fast
@given(data=st.data(), seed=SEEDS, scale=st.sampled_from([2.0**-140, 2.0**-130, 1e-10, 1e-3, 1.0, 30.0]))
def test_no_element_is_further_off_than_half_a_scale_and_rounding(
    codec: Codec, dtype: str, data: st.DataObject, seed: int, scale: float
) -> None:
    piece = Piece(codec, dtype, data.draw(counts(codec)))
    if piece.count > piece.elements:
        return
    values, base = normal(dtype, piece.count, seed), normal(dtype, piece.count, seed + 1)
    if data.draw(st.booleans()):
        base = np.zeros_like(base)
    values = (wide(base) + wide(values) * scale).astype(np.float32).astype(DTYPES[dtype])
    error = np.abs(wide(piece.there_and_back(values, base)) - wide(values))
    assert np.all(error <= bound(codec, dtype, values, base))


@blocks
def test_the_largest_change_of_a_block_is_nearly_exact(codec: Codec) -> None:
    piece = Piece(codec, "float32", 256)
    base = np.zeros(256, np.float32)
    values = normal("float32", 256, 0)
    decoded = piece.there_and_back(values, base)
    for at in np.abs(values).reshape(2, 128).argmax(axis=1) + [0, 128]:
        assert abs(float(decoded[at]) - float(values[at])) <= abs(float(values[at])) * 2.0**-22


@changes
def test_repeated_pushes_of_the_same_values_reach_them(codec: Codec) -> None:
    piece = Piece(codec, "float32", 1000)
    center, values = normal("float32", 1000, 0), normal("float32", 1000, 1)
    for _ in range(12):
        center = piece.there_and_back(values, center)
    np.testing.assert_allclose(center, values, rtol=2.0**-22)


@every_dtype
@fast
@given(seed=SEEDS, count=st.integers(133, 4096))
def test_what_equals_the_base_stays_bit_for_bit_beside_anything(
    codec: Codec, dtype: str, seed: int, count: int
) -> None:
    piece = Piece(codec, dtype, count)
    base, values = any_bits(dtype, count, seed), any_bits(dtype, count, seed + 1)
    same = np.random.default_rng(seed + 2).random(count) < 0.5
    values[same] = base[same]
    decoded = piece.there_and_back(values, base)
    if dtype == "float32":
        assert decoded[same].tobytes() == base[same].tobytes()
    else:  # Widening and rounding may quiet a NaN.
        same &= ~np.isnan(wide(base))
        assert decoded[same].tobytes() == base[same].tobytes()


@changes
def test_changes_that_are_too_small_for_a_normal_scale_are_none(codec: Codec) -> None:
    piece, base = Piece(codec, "float32", 256), np.zeros(256, np.float32)
    values = np.full(256, 2.0**-126, np.float32)
    values[::3] = -(2.0**-149)
    values[:128] = -0.0
    decoded = piece.there_and_back(values, base)
    if codec is BFLOAT16:
        assert np.all(np.abs(wide(decoded) - wide(values)) <= 2.0**-134)
    else:
        assert decoded.tobytes() == base.tobytes()
        least = np.float32(LEAST_NORMAL * LEVELS[codec.name])
        assert piece.there_and_back(np.full(256, least), base).tobytes() == np.full(256, least).tobytes()


# What is not finite.


@every_dtype
@fast
@given(seed=SEEDS, data=st.data())
def test_nan_and_infinities_stay_where_they_are_and_finite_values_stay_finite(
    codec: Codec, dtype: str, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(133, 4096))
    piece = Piece(codec, dtype, count)
    kinds = st.sampled_from([any_bits, normal])
    values, base = data.draw(kinds)(dtype, count, seed), data.draw(kinds)(dtype, count, seed + 1)
    decoded = wide(piece.there_and_back(values, base))
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(wide(values)))
    np.testing.assert_array_equal(decoded == np.inf, wide(values) == np.inf)
    np.testing.assert_array_equal(decoded == -np.inf, wide(values) == -np.inf)


@every_dtype
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["values", "base", "both"])
def test_the_neighbours_of_what_is_not_finite_are_nearly_as_exact_as_ever(
    codec: Codec, dtype: str, strange: float, where: str
) -> None:
    piece = Piece(codec, dtype, 300)
    values, base = normal(dtype, 300, 0), normal(dtype, 300, 1, 0.5)
    at = [5, 130, 299]
    given_values, given_base = values.copy(), base.copy()
    if where != "base":
        given_values[at] = strange
    if where != "values":
        given_base[at] = strange
    decoded = piece.there_and_back(given_values, given_base)
    # The base counts as 0 where it is not finite; two codes less are left for a block.
    base[at] = 0
    if where != "base":
        values[at] = 0
        np.testing.assert_array_equal(wide(decoded[at]), [strange] * 3)
        decoded[at] = 0
    wider = LEVELS[codec.name] / (LEVELS[codec.name] - 1) if codec is not BFLOAT16 else 1.0
    assert np.all(np.abs(wide(decoded) - wide(values)) <= bound(codec, dtype, values, base) * wider)


@every_dtype
def test_values_at_the_end_of_the_range_stay_finite(codec: Codec, dtype: str) -> None:
    piece, large = Piece(codec, dtype, 384), LARGEST[dtype]
    values, base = normal(dtype, 384, 0, 1000.0), normal(dtype, 384, 1, 1000.0)
    values[:6] = np.array([large, -large, large, -large, large, 0.0]).astype(DTYPES[dtype])
    base[:6] = np.array([0.0, 0.0, -large, large, large * 0.99, large]).astype(DTYPES[dtype])
    values[300] = base[300] = large
    base[301], values[301] = large * 0.996, large
    decoded = wide(piece.there_and_back(values, base))
    assert np.all(np.isfinite(decoded))
    # Only the changes that no finite number can hold are clipped.
    level = large / (LEVELS[codec.name] - 1 if codec is not BFLOAT16 else 256)
    off = np.abs(decoded - wide(values))
    np.testing.assert_array_less(off[[0, 1, 4, 5]], level)
    np.testing.assert_array_less(off[2:4], 1.01 * large)


@changes
@fast
@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]), seed=SEEDS, shift=st.integers(0, 7))
def test_any_bytes_are_decoded_to_some_values_without_a_warning(
    codec: Codec, data: st.DataObject, dtype: str, seed: int, shift: int
) -> None:
    count = data.draw(st.integers(1, 2048))
    piece, chance = Piece(codec, dtype, count), np.random.default_rng(seed)
    size_bytes = codec.size_bytes(piece.manifest, 1)
    hostile = chance.bytes(size_bytes) if data.draw(st.booleans()) else b"\xff\xff\x7f\xff\x80\x7f" * size_bytes
    decoded = piece.decode(hostile[:size_bytes], any_bits(dtype, count, seed), shift)
    assert decoded.shape == (count,)


# Sizes, and what is coded.


@every_dtype
def test_large_variables_take_the_stated_part_of_their_size(codec: Codec, dtype: str) -> None:
    most = {"bfloat16": 0.5, "int8": 0.265, "int4": 0.14}[codec.name] * 4 / DTYPES[dtype].itemsize
    manifest = Manifest((Variable("v", dtype, (10_000_000,)),))
    total = codec.run_size_bytes(manifest, 0, manifest.fragment_count)
    assert total <= most * manifest.buffer_size_bytes


@changes
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("size", [1023, 1024])
def test_small_variables_and_other_dtypes_are_raw_without_padding(codec: Codec, dtype: str, size: int) -> None:
    manifest = Manifest((Variable("a", "float16", (3,)), Variable("v", dtype, (size,))), 16384)
    values = [normal("float16", 3, 0), normal(dtype, size, 1)]
    base = [normal("float16", 3, 2), normal(dtype, size, 3)]
    data = b"".join(codec.encode(manifest, 0, values, base))
    raw = values[0].tobytes() + values[1].tobytes()
    if size == 1024 and dtype in CODED[codec.name]:
        assert len(data) < len(raw)
    else:
        assert data == raw
    found = codec.decode(manifest, 0, memoryview(data), base)
    assert found[0].tobytes() == values[0].tobytes()


@changes
@fast
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    size=st.integers(1020, 5000),
    fragment_size_bytes=st.integers(1, 700).map(lambda number: 8 * number),
)
def test_no_fragment_is_empty_or_larger_than_raw(codec: Codec, dtype: str, size: int, fragment_size_bytes: int) -> None:
    manifest = Manifest((Variable("v", dtype, (size,)),), fragment_size_bytes)
    for index in range(manifest.fragment_count):
        start, stop = manifest.fragment_bounds(index)
        assert 1 <= codec.size_bytes(manifest, index) <= stop - start <= codec.max_size_bytes(manifest)


@changes
def test_a_fragment_that_is_coded_has_one_size_only(codec: Codec) -> None:
    piece = Piece(codec, "float32", 300)
    data = piece.encode(normal("float32", 300, 0), normal("float32", 300, 1))
    expected = {"bfloat16": 600, "int8": 3 * 132, "int4": 3 * 68}[codec.name]
    assert len(data) == expected
    for wrong in (data[:-1], data + b"x"):
        with pytest.raises(ProtocolError, match=f"codec {codec.name} gives it {expected}") as error:
            codec.check_size(piece.manifest, 1, memoryview(wrong))
        assert error.value.reason is Reason.FRAGMENT_SIZE_WRONG


@changes
def test_a_piece_is_coded_alike_in_one_step_and_in_many(codec: Codec) -> None:
    """A fragment is coded in steps of some 10,000 elements; no block is cut."""
    count = 200_000
    values, base = normal("float32", count, 0), normal("float32", count, 1)
    values[70_000], values[131_071], base[131_072], values[count - 1] = np.nan, np.inf, np.inf, 2.0**120
    whole = Manifest((Variable("v", "float32", (count,)),))
    data = b"".join(codec.encode(whole, 0, [values], [base]))
    (decoded,) = codec.decode(whole, 0, memoryview(data), [base])
    small = Manifest((Variable("v", "float32", (count,)),), 4 * 1280)
    for index, (piece,) in enumerate(small.pieces):
        part = slice(piece.start, piece.start + piece.count)
        apart = b"".join(codec.encode(small, index, [values[part]], [base[part]]))
        (found,) = codec.decode(small, index, memoryview(apart), [base[part]])
        assert found.tobytes() == decoded[part].tobytes()


# The bytes.


class Oracle:
    """int8 and int4 as docs/protocol.md describes them, one element at a time."""

    def __init__(self, codec: Codec, dtype: str) -> None:
        self.levels = LEVELS[codec.name]
        self.four_bits = codec is INT4
        self.dtype = dtype
        self.huge = 2.0**7 if dtype == "float16" else 2.0**100

    def encode(self, values: Array, base: Array) -> bytes:
        scales, packed = b"", b""
        for at in range(0, len(values), 128):
            ours = [np.float32(value) for value in values[at : at + 128]]
            theirs = [np.float32(value) for value in base[at : at + 128]]
            scale, codes = self._block(ours, theirs)
            scales += struct.pack("<f", scale)
            codes += [0] * (128 - len(codes))
            if self.four_bits:
                packed += bytes(codes[i] % 16 + 16 * (codes[i + 64] % 16) for i in range(64))
            else:
                packed += struct.pack("128b", *codes)
        return scales + packed

    def _block(self, values: list[np.float32], base: list[np.float32]) -> tuple[np.float32, list[int]]:
        changes = [b - v for v, b in zip(values, base, strict=True)]
        if all(abs(change) < self.huge for change in changes):
            scale = self._scale(changes, self.levels)
            return scale, [self._code(change, scale) for change in changes]
        most = np.float32(LARGEST["float32"])
        base = [b if np.isfinite(b) else np.float32(0) for b in base]
        finite = {
            i: max(-most, min(most, b - v)) for i, (v, b) in enumerate(zip(values, base, strict=True)) if np.isfinite(v)
        }
        scale = self._scale(list(finite.values()), self.levels - 1)
        codes = []
        for i, value in enumerate(values):
            if i in finite:
                codes.append(self._code(finite[i], scale))
            else:
                codes.append(-self.levels - 1 if np.isnan(value) else self.levels if value > 0 else -self.levels)
        return -scale, codes

    @staticmethod
    def _scale(changes: list[np.float32], levels: int) -> np.float32:
        largest = max((float(abs(change)) for change in changes), default=0.0)
        scale: np.float32 = np.float32(largest) / np.float32(levels)
        return scale if scale >= LEAST_NORMAL else np.float32(0)

    @staticmethod
    def _code(change: np.float32, scale: np.float32) -> int:
        return round(float(change / scale)) if scale else 0

    def decode(self, data: bytes, base: Array) -> Iterator[np.float32]:
        count = -(-len(base) // 128)
        scales, packed = struct.unpack(f"<{count}I", data[: 4 * count]), data[4 * count :]
        for at, center in enumerate(np.float32(value) for value in base):
            block, i = divmod(at, 128)
            if self.four_bits:
                code = packed[64 * block + i % 64] >> (4 if i >= 64 else 0) & 15
                code -= 16 if code > 7 else 0
            else:
                code = struct.unpack_from("b", packed, 128 * block + i)[0]
            (scale,) = struct.unpack("<f", struct.pack("<I", scales[block] & 0x7FFFFFFF))
            if not scales[block] >> 31:
                yield center - np.float32(code) * np.float32(scale)
            elif code == -self.levels - 1:
                yield center if np.isnan(center) else np.float32(np.nan)
            elif abs(code) == self.levels:
                yield np.float32(np.inf if code > 0 else -np.inf)
            else:
                change = np.float32(code) * np.float32(scale)
                limit = np.float32(LARGEST[self.dtype])
                value = (center if np.isfinite(center) else np.float32(0)) - change
                yield max(-limit, min(limit, value))


@blocks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [any_bits, normal])
@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_are_those_of_a_plain_description(codec: Codec, dtype: str, kind: Any, seed: int) -> None:
    count = 128 * (4 + seed) + (0, 1, 77)[seed]
    piece, oracle = Piece(codec, dtype, count), Oracle(codec, dtype)
    values, base = kind(dtype, count, seed), kind(dtype, count, seed + 10)
    values[200:300] = base[200:300]
    with np.errstate(all="ignore"):
        data = oracle.encode(values, base)
        assert piece.encode(values, base) == data
        expected = np.array(list(oracle.decode(data, base)), np.float32)
        (found,) = codec.decode(piece.manifest, 1, memoryview(data), [base])
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("codec", "element_3", "start"),
    [
        (BFLOAT16, 1.0, "00 3f 80 be 00 be 00 00"),
        (INT8, 1.0, "04 02 81 3b 7f c0 e0 00"),
        (INT4, 1.0, "25 49 92 3d 37 0d 0e 00"),
        (BFLOAT16, np.nan, "00 3f 80 be 00 be c0 7f"),
        (INT8, np.nan, "21 08 82 bb 7e c1 e1 80"),
        (INT4, np.nan, "ab aa aa bd 36 0d 0e 08"),
    ],
)
def test_the_examples_of_the_page(codec: Codec, element_3: float, start: str) -> None:
    """A piece of 70 elements in docs/protocol.md; five of them have changed."""
    base, values = np.ones(70, np.float32), np.ones(70, np.float32)
    values[[0, 1, 2, 3, 64]] = 0.5, 1.25, 1.125, element_3, 0.75
    data = Piece(codec, "float32", 70).encode(values, base)
    expected = bytearray(bytes.fromhex(start).ljust({"bfloat16": 140, "int8": 132, "int4": 68}[codec.name], b"\0"))
    if codec is BFLOAT16:
        expected[128:130] = b"\x80\x3e"
    elif codec is INT8:
        expected[4 + 64] = 64 if element_3 == 1.0 else 63
    assert data == expected


def test_bfloat16_is_the_upper_half_of_a_float32_rounded_to_even() -> None:
    piece, base = Piece(BFLOAT16, "float32", 6), np.zeros(6, np.float32)
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x00018000, 0x7F7FFFFF], np.uint32)
    data = piece.encode(-bits.view(np.float32), base)
    # The last one is clipped to the largest bfloat16.
    assert list(struct.unpack("<6H", data)) == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x0002, 0x7F7F]
    assert piece.encode(np.array([np.inf, -np.inf, np.nan, 0, -0.0, 1], np.float32), base) == struct.pack(
        "<6H", 0xFF80, 0x7F80, 0x7FC0, 0, 0, 0xBF80
    )
