"""The staging buffer: a center that arrives coded, relative to the one that it replaces, and one that breaks off."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client.transports.base import OutgoingPush
from ma_client.transports.link_bytes import LinkBytes
from ma_client.transports.staging import Memory, Staging
from modelaverage.codecs import CODECS, RAW, Codec
from modelaverage.errors import ProtocolError
from modelaverage.manifest import Manifest, Variable
from tests.centers import SEEDS, Arrays, random_arrays, random_bits
from tests.strategies import fast

LOSSY = [codec for codec in CODECS.values() if codec is not RAW]
# Variables that are coded and raw, and begin and end within fragments.
MODEL = (
    Variable("w", "float32", (1500,)),
    Variable("scale", "float64", ()),
    Variable("h", "float16", (1100,)),
    Variable("few", "float32", (37,)),
    Variable("b", "bfloat16", (1024,)),
)
_models = st.sampled_from([512, 1024, 4096, 1 << 20]).map(lambda size_bytes: Manifest(MODEL, size_bytes))
_codecs = st.sampled_from(LOSSY)


def flat_of(manifest: Manifest, values: Arrays) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    flat = np.zeros(manifest.buffer_size_bytes, np.uint8)
    for name, array in manifest.arrays(flat).items():
        array[...] = values[name]
    return flat


def filled(manifest: Manifest, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Staging:
    """A staging, not at the beginning of its memory, with a whole center."""
    staging = Staging(manifest, Memory(64 + manifest.buffer_size_bytes), 64)
    staging.begin()
    for index in range(manifest.fragment_count):
        staging.receive(index, RAW.encode_run(manifest, flat, index, index + 1))
    staging.check_complete()
    return staging


def arriving(
    manifest: Manifest,
    codec: Codec,
    base: np.ndarray[tuple[int], np.dtype[np.uint8]],
    new: np.ndarray[tuple[int], np.dtype[np.uint8]],
    cuts: list[int],
) -> Iterator[tuple[int, memoryview]]:
    """The new center, in runs that end at these fragments: the first index and the bytes of each."""
    ends = sorted({*(cut % (manifest.fragment_count + 1) for cut in cuts), manifest.fragment_count} - {0})
    first = 0
    for end in ends:
        coded = [
            part
            for index in range(first, end)
            for part in codec.encode(
                manifest, index, manifest.piece_arrays(index, new), manifest.piece_arrays(index, base)
            )
        ]
        yield first, RAW.encode_run(manifest, new, first, end) if codec is RAW else memoryview(b"".join(coded))
        first = end


@fast
@given(_models, st.sampled_from(list(CODECS.values())), SEEDS, st.lists(st.integers(0, 50)), st.integers(0, 50))
def test_whatever_prefix_of_a_center_has_come_the_old_one_is_restored_bit_for_bit(
    manifest: Manifest, codec: Codec, seed: int, cuts: list[int], broken_after: int
) -> None:
    chance = np.random.default_rng(seed)
    base = flat_of(manifest, random_bits(manifest, chance))
    staging = filled(manifest, base)
    for _ in range(2):  # what is kept is used again
        new = flat_of(manifest, random_arrays(manifest, chance))
        staging.begin(keeps_old=True)
        runs = list(arriving(manifest, codec, base, new, cuts))[:broken_after]
        for first, data in runs:
            staging.put(first, data, codec)
        assert staging.is_whole == (not runs)
        staging.roll_back()
        assert staging.is_whole
        assert staging.flat.tobytes() == base.tobytes()
        staging.roll_back()  # nothing is left to restore
        assert staging.flat.tobytes() == base.tobytes()


@fast
@given(_models, _codecs, SEEDS, st.lists(st.integers(0, 50)))
def test_a_center_that_comes_whole_is_the_old_one_with_the_decoded_changes(
    manifest: Manifest, codec: Codec, seed: int, cuts: list[int]
) -> None:
    chance = np.random.default_rng(seed)
    base = flat_of(manifest, random_bits(manifest, chance))
    new = flat_of(manifest, random_arrays(manifest, chance))
    staging, expected = filled(manifest, base), base.copy()
    staging.begin(keeps_old=True)
    for first, data in arriving(manifest, codec, base, new, cuts):
        staging.put(first, data, codec)
        for index, part in codec.split_run(manifest, first, data):
            codec.decode_into(manifest, expected, index, part, base)
    staging.is_filled()
    staging.roll_back()  # too late: it has come
    assert staging.flat.tobytes() == expected.tobytes()


@fast
@given(_models, _codecs, SEEDS, st.integers(0, 50), st.integers(0, 50))
def test_a_push_made_again_encodes_the_same_bytes_wherever_it_broke(
    manifest: Manifest, codec: Codec, seed: int, sent: int, came: int
) -> None:
    chance = np.random.default_rng(seed)
    base = flat_of(manifest, random_arrays(manifest, chance))
    staging = filled(manifest, base)
    local = [array.reshape(-1).view(np.uint8).data for array in random_arrays(manifest, chance).values()]
    push = OutgoingPush(1, local, staging, codec, True, True, LinkBytes())

    def encoded(index: int) -> bytes:
        return b"".join(push.fragment(index))

    once = [encoded(index) for index in range(manifest.fragment_count)]
    staging.begin(keeps_old=True)
    # Every fragment of the center may come as soon as the server has this worker's.
    runs = arriving(manifest, codec, base, flat_of(manifest, random_arrays(manifest, chance)), list(range(50)))
    for index in range(manifest.fragment_count):
        if index <= sent:
            assert encoded(index) == once[index]
        if index <= min(sent, came):
            staging.put(*next(runs), codec)
    staging.roll_back()
    assert [encoded(index) for index in range(manifest.fragment_count)] == once


def test_without_keeping_a_center_that_breaks_off_leaves_none() -> None:
    manifest = Manifest(MODEL, 1024)
    base = flat_of(manifest, random_arrays(manifest, np.random.default_rng(0)))
    staging = filled(manifest, base)
    staging.begin(keeps_old=True)
    staging.roll_back()
    staging.begin()
    staging.put(0, RAW.encode_run(manifest, base, 0, 1))
    staging.roll_back()
    assert not staging.is_whole


def test_a_server_that_sends_a_fragment_twice_does_not_spoil_what_is_kept() -> None:
    manifest = Manifest(MODEL, 1024)
    base = flat_of(manifest, random_arrays(manifest, np.random.default_rng(0)))
    other = flat_of(manifest, random_arrays(manifest, np.random.default_rng(1)))
    staging = filled(manifest, base)
    staging.begin(keeps_old=True)
    for first, end in ((0, 3), (0, 1), (1, 2)):
        staging.put(first, RAW.encode_run(manifest, other, first, end))
    staging.roll_back()
    assert staging.flat.tobytes() == base.tobytes()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_coded_fragment_of_the_wrong_size_is_refused_and_the_old_center_stays(codec: Codec, change: int) -> None:
    manifest = Manifest(MODEL, 1024)
    base = flat_of(manifest, random_arrays(manifest, np.random.default_rng(0)))
    staging = filled(manifest, base)
    staging.begin(keeps_old=True)
    with pytest.raises(ProtocolError, match=f"bytes for fragment 1, which has {codec.size_bytes(manifest, 1)}"):
        staging.put(1, memoryview(bytes(codec.size_bytes(manifest, 1) + change)), codec)
    assert staging.is_whole
    assert staging.flat.tobytes() == base.tobytes()
